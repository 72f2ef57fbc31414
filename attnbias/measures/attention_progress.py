"""Attention progress: the share of a head's attention that lies where the answer is made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.sites import sites
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.losses import tower_sites
from attnbias.measures.scores import Scores, gather

CORRECT = "correct"


@dataclass(frozen=True)
class AttentionProgress(HeadMeasure):
    r"""The share of each head's attention that lies on the keys an answer is made from.

    .. math:: \mathrm{AP}_h = \frac{\sum_{i} \sum_{j \in c(i)} |p^h_{ij}|}
        {\sum_{i} \sum_j |p^h_{ij}|}

    over the queries i that give an answer, those with at least one key named. It rises smoothly
    while a loss stands on a plateau, before accuracy jumps. Beside it the two signs of the plateau:
    hidden states of all answers grow alike, and the model says one token again and again.

    Data: forwards with one more entry, ``"correct"``: key positions ``(tokens, T)`` or ``(rows,
    tokens, T)`` for each query position, -1 for none; the same key is not named twice for a query.

    Args:
        tower: which one is measured; None: the text.

    Returns:
        `Scores`, a sample for each row, 0 to 1; NaN for a row without answers. details:
        ``"collapse"`` ``(samples,)``, mean cosine between the last hidden states of answers (see
        `collapse`; None where a model has none of its tokens), ``"repetition"``, the share of equal
        neighbours among the tokens that the model predicts at the answers (None without next-token
        scores).

    Cost: one forward, O(tokens T) and one more unbiased call. No map.

    Raises:
        AttnbiasError: forwards without "correct", or keys that are no whole numbers.

    Source: What Happens During the Loss Plateau? Understanding Abrupt Learning in Transformers,
    2025; authors' code read. There attention is linear, whose weights have signs (`progress` takes
    such maps); under a softmax the sum below is the number of answers. Departs: repetition is
    counted on predictions given the right tokens before, not on the model's own text.
    """

    name: ClassVar[str] = "attention_progress"
    tower: str | None = None

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given = forwards(data, "AttentionProgress")
        tower = tower_sites(model, self.tower)[0].tower
        parts: list[Tensor] = []
        alike: list[Tensor | None] = []
        again: list[Tensor | None] = []
        with evaluating(model), torch.no_grad(), bar(len(given), self.name, progress) as tick:
            for forward in given:
                layers, found, out, answers = _seen(model, forward, tower)
                parts.append(found)
                alike.append(
                    _rowwise(getattr(out, "hidden_states", (None,))[-1], answers, collapse)
                )
                said = getattr(out, "logits", None)
                words = None if said is None or said.ndim != 3 else said.argmax(-1)
                again.append(_rowwise(words, answers, repetition))
                tick()
        details = {"collapse": _joined(alike), "repetition": _joined(again)}
        return Scores(self.name, tower, tuple(layers), gather(parts), details=details)


def _seen(
    model: nn.Module, forward: Mapping[str, Any], tower: str
) -> tuple[list[int], Tensor, Any, Tensor]:
    """Layers, scores ``(rows, layers, heads)``, output, and the slots of the answers."""
    from attnbias.observe import observe, statistics

    if CORRECT not in forward:
        raise AttnbiasError(
            "AttentionProgress needs forwards with the keys of each answer: {'input_ids': ..., "
            "'correct': (tokens, T) key positions, -1 for none}."
        )
    inputs = {word: value for word, value in forward.items() if word != CORRECT}
    at = torch.as_tensor(forward[CORRECT])
    if at.ndim not in (2, 3) or at.is_floating_point() or at.dtype == torch.bool:
        raise AttnbiasError(
            f"correct must be whole numbers (tokens, T) or (rows, tokens, T), got {at.dtype} of "
            f"shape {tuple(at.shape)}."
        )
    looks = [statistics.At(CORRECT, count=at.shape[-1]), statistics.Share(("all",))]
    numbers = {tower: [site.layer for site in sites(model) if site.tower == tower]}
    spans = {"all": (0, None)}
    with observe(model, looks, spans=spans, targets={CORRECT: at}, layers=numbers) as seen:
        out = model(**inputs, output_hidden_states=True)
    named = seen.tensor(looks[0].label, tower)
    there = ~named.values[0].isnan().all(-1)  # (layers, rows, heads, queries)
    upper = named.values[0].nansum(-1).where(there, 0.0).sum(-1)
    whole = seen.tensor(looks[1].label, tower).values[0][..., 0]
    lower = whole.where(there, 0.0).nansum(-1)
    found = (upper / lower).movedim(1, 0)  # 0 / 0 is NaN: no answers
    answers = there.any(0).any(1)  # (rows, positions)
    return list(named.labels["layer"]), found, out, _slots(answers, inputs)


def _slots(answers: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    """Answers by position as answers by slot, past the padding."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return answers
    found = torch.zeros(mask.shape, dtype=torch.bool)
    for row, keep in enumerate(mask.bool().cpu()):
        found[row, keep] = answers[row, : int(keep.sum())]
    return found


def _rowwise(values: Any, answers: Tensor, what: Any) -> Tensor | None:
    """A number for each row from its answers; NaN with fewer than three of them."""
    if values is None or values.shape[:2] != answers.shape:
        return None
    found = []
    for row, own in enumerate(answers):
        few = int(own.sum()) < 3
        kept = values[row : row + 1].cpu()[:, own]
        found.append(torch.tensor(torch.nan).double() if few else what(kept)[0])
    return torch.stack(found)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    return torch.cat(known) if len(known) == len(parts) else None


def progress(maps: Tensor, correct: Tensor) -> Tensor:
    r"""The share of the weight of a map that lies on chosen entries.

    .. math:: \mathrm{AP} = \frac{\sum_{(i,j) \in C} |A_{ij}|}{\sum_{ij} |A_{ij}|}

    Args:
        maps: ``(batch, heads, queries, keys)``, the rows that give answers; with a sign or not.
        correct: ``(queries, keys)`` or ``(batch, queries, keys)`` booleans.

    Returns:
        ``(batch, heads)``, 0 to 1; NaN where the whole map is zero.
    """
    chosen = correct if correct.ndim == 2 else correct[:, None]
    size = maps.double().abs()
    return (size * chosen).sum((-2, -1)) / size.sum((-2, -1))


def repetition(answers: Tensor) -> Tensor:
    """The share of equal neighbours among answers ``(batch, length)``: ``(batch,)``."""
    return (answers[:, 1:] == answers[:, :-1]).double().mean(1)


def collapse(states: Tensor) -> Tensor:
    """The mean cosine between the hidden states ``(batch, answers, size)`` of a row: ``(batch,)``.

    Over all pairs of answers but those with the first, which is learnt apart from the others.
    """
    unit = torch.nn.functional.normalize(states[:, 1:].double(), dim=-1)
    count = unit.shape[1]
    pairs = torch.ones(count, count, dtype=torch.bool, device=states.device).tril(-1)
    return (unit @ unit.mT)[:, pairs].mean(1)
