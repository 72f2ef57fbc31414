"""Episodic memory: contiguity, primacy and recency of attention to a list that was just read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating
from attnbias.measures.lag_profile import check, lag_targets
from attnbias.measures.probes import Drawer, First, drawer, text_tower
from attnbias.measures.scores import Scores, gather

_BATCH = 2


@dataclass(frozen=True)
class EpisodicMemory(HeadMeasure):
    r"""The lag-CRP and the serial-position curve of every head, and of the model's predictions.

    A list of different tokens in random order is followed by the same tokens in another order. With
    :math:`\pi(i)` the place in the list of the token at place i after it,

    .. math:: a_h(l) = \operatorname{mean}_i\; p^h_{L + i,\; \pi(i) + l}, \qquad
        s_h(j) = \operatorname{mean}_i\; p^h_{L + i,\; j}

    over many orders, so that only places matter. Free recall in people has a peak at lag 1 that is
    higher than the one at lag -1 (contiguity, forward asymmetry), and first and last places stand
    out (primacy, recency). The score is the attention at lag 1, by which the work picks induction
    heads. Measured inside `ab.steer`, these are the curves of the edited model, as with heads
    ablated (``ab.rules.BlockHeads(heads=scores.top(k))``).

    Args:
        length: of the list; published 500. lags: on each side.
        count: random orders, one sample each. seed, first: see `InductionHeads`.
        tokens: token numbers to draw from; published the 500 commonest of the training text. None:
            the middle 80 % of the vocabulary.

    Returns:
        `Scores`; details: ``"lags"``; ``"profile"`` ``(layers, heads, lags)``; ``"serial"``
        ``(layers, heads, length)``; ``"contiguity"`` (mean at lags -1 and 1 less the mean of the
        lags further away), ``"asymmetry"`` (lag 1 less lag -1), ``"primacy"`` and ``"recency"``
        (first and last tenth of places less the middle), each ``(layers, heads)``; ``"said"``
        ``(lags,)``, the mean probability that the model gives to the token at each lag as the next
        one, None for a model without next-token scores.

    Cost: a forward, O(tokens lags) and one more unbiased call a list.

    Raises:
        AttnbiasError: a bad field, a probe longer than the model reads, data.
        Refused: a model without one tower of text.

    Source: after Emergence of Episodic Memory in Transformers: Characterizing Changes in Temporal
    Structure of Attention Scores During Training, 2025 (arXiv 2502.06902); abstract and a summary
    read. Left open there and chosen here: a whole second list follows, attention after the softmax,
    ten lags, the tenths of primacy and recency.
    """

    name: ClassVar[str] = "episodic_memory"
    length: int = 500
    lags: int = 10
    count: int = 10
    seed: int = 0
    tokens: Sequence[int] | None = None
    first: First = "model"

    def __post_init__(self) -> None:
        check(self, (("length", 10), ("lags", 2), ("count", 1)))
        if self.lags >= self.length:
            raise AttnbiasError(f"EpisodicMemory(lags) must be below the length, got {self.lags}.")

    def probes(self, model: nn.Module) -> tuple[Tensor, Tensor, int]:
        """The probes ``(count, tokens)``, the second orders ``(count, length)``, the beginning."""
        source = drawer(model, self.tokens, self.first, 1 + 2 * self.length, "EpisodicMemory")
        lists = source.lists(self.count, self.length, self.seed)
        places = Drawer(torch.arange(self.length), None, torch.device("cpu"))
        order = places.lists(self.count, self.length, self.seed + 1)
        return source.begun(torch.cat([lists, lists.gather(1, order)], 1)), order, source.start

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        from attnbias.observe import observe, statistics

        if data is not None:
            raise AttnbiasError("EpisodicMemory makes its own probes: leave data out.")
        tower = text_tower(model, "EpisodicMemory")
        probes, order, start = self.probes(model)
        width = 2 * self.lags + 1
        looks = [statistics.At("lag", count=width), statistics.Given("second")]
        spans = {"second": (start + self.length, start + 2 * self.length)}
        lags: list[Tensor] = []
        serial: list[Tensor] = []
        said: list[Tensor] = []
        steps = range(0, self.count, _BATCH)
        with evaluating(model), torch.no_grad(), bar(len(steps), self.name, progress) as tick:
            for at in steps:
                rows = slice(at, at + _BATCH)
                targets = {"lag": lag_targets(order[rows], start, self.lags)}
                with observe(model, looks, spans=spans, targets=targets) as seen:
                    out = model(input_ids=probes[rows])
                shown = seen.tensor(looks[0].label, tower)
                lags.append(shown.values[0].movedim(0, 1).nanmean(-2))
                first = seen.tensor(looks[1].label, tower).values[0].movedim(0, 1)
                serial.append(first[..., start : start + self.length])
                said += _said(out, probes[rows], targets["lag"])
                tick()
        profile = _mean(lags)
        details: dict[str, Any] = {
            "lags": list(range(-self.lags, self.lags + 1)),
            "profile": profile,
            "serial": _mean(serial),
            "said": torch.stack(said).mean(0) if len(said) == self.count else None,
            **self._curves(profile, _mean(serial)),
        }
        samples = gather([part[..., self.lags + 1] for part in lags])
        return Scores(self.name, tower, tuple(shown.labels["layer"]), samples, details=details)

    def _curves(self, profile: Tensor, serial: Tensor) -> dict[str, Tensor]:
        middle, tenth = self.lags, self.length // 10
        far = [n for n in range(2 * middle + 1) if abs(n - middle) > 1]
        inside = serial[..., tenth:-tenth].mean(-1)
        back, ahead = profile[..., middle - 1], profile[..., middle + 1]
        return {
            "contiguity": (back + ahead) / 2 - profile[..., far].mean(-1),
            "asymmetry": ahead - back,
            "primacy": serial[..., :tenth].mean(-1) - inside,
            "recency": serial[..., -tenth:].mean(-1) - inside,
        }


def _mean(parts: list[Tensor]) -> Tensor:
    """The mean over all lists ``(batch, layers, heads, ...)``."""
    return torch.cat(parts).mean(0)


def _said(out: Any, ids: Tensor, targets: Tensor) -> list[Tensor]:
    """By row ``(lags,)``: the probability of the token at each lag, as the next one."""
    logits = getattr(out, "logits", None)
    if logits is None or logits.shape[:2] != ids.shape:
        return []
    found = []
    for row in range(len(ids)):
        second = (targets[row] >= 0).any(-1).nonzero()[:, 0]
        at = targets[row, second].to(ids.device)
        chance = logits[row, second].double().softmax(-1)
        each = chance.gather(1, ids[row][at.clamp_min(0)])
        found.append(torch.where(at >= 0, each, torch.nan).nanmean(0).cpu())
    return found
