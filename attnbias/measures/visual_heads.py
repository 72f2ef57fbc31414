"""Heads of a model of images and text that look at the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Head, Scores, gather
from attnbias.measures.seeing import by_sample, layers_of, looked, tower_of

STAGES = {32: (10, 20), 40: (13, 27)}
"""Published ends of the first and second stage, by the number of layers; else thirds."""


@dataclass(frozen=True)
class VisualHeads(HeadMeasure):
    r"""Visual heads: much attention to the image in the first decoding step, on few of its tokens.

    .. math:: s = w\, c, \qquad w = \sum_{j \in \text{image}} p_{ij}, \qquad
        c = 1 - \frac{H(p_{ij} / w : j \in \text{image})}{\ln |\text{image}|}

    for the last token ``i`` of the prompt. `details` hold "weight" and "concentration" ``(samples,
    layers, heads)``, and "region" where a span of that name is given: the weight on the part of the
    image that a question refers to.

    Args:
        by: "score", or "weight" or "concentration" alone.

    `data` are forwards; where the config of the model names no image token each also holds
    ``spans``, as `observe` takes them, with "image" and, if there is one, "region". Padding may be
    on either side. `stage_top` and `stage_others` give heads of one third of the depth and as many
    others of it.

    Cost: the forward and two calls a layer; O(tokens) memory.

    Raises:
        AttnbiasError: no data, no image in a row.

    Source: after Unveiling Visual Perception in Language Models: An Attention Head Analysis
    Approach (2024, arXiv 2412.18108); authors' code read, which holds the weights, the region and
    the masking but reads ready-made rankings: weight and an entropy-based concentration are joined
    there by a formula not released; the product and the normaliser are chosen here. Masking a head
    there sets its scores to 0 after the causal mask, so that it also sees later tokens;
    ``rules.BlockHeads(mode="uniform")`` keeps the mask.
    """

    name: ClassVar[str] = "visual_heads"
    by: str = "score"

    def __post_init__(self) -> None:
        if self.by not in ("score", "weight", "concentration"):
            raise AttnbiasError(
                f"VisualHeads(by) is score, weight or concentration, got {self.by!r}."
            )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        """A score for each prompt and head; see `Measure.measure`."""
        from attnbias.observe import statistics

        given = forwards(data, "VisualHeads")
        tower = tower_of(model, "VisualHeads", None, "text")
        parts: dict[str, list[Tensor]] = {}
        layers: tuple[int, ...] = ()
        with evaluating(model), torch.no_grad(), bar(len(given), "visual heads", progress) as tick:
            for forward in given:
                inputs = {name: value for name, value in forward.items() if name != "spans"}
                spans, last = places(model, inputs, forward.get("spans"))
                wanted = [statistics.Share(), statistics.Given("last")]
                seen = looked(model, inputs, list(wanted), tower, {**spans, "last": last})
                found = _measured(seen, tower, spans, last)
                for name, values in found.items():
                    parts.setdefault(name, []).append(values)
                layers = layers_of(seen, "share", tower)
                tick()
        if len({len(values) for values in parts.values()}) > 1:
            raise AttnbiasError("VisualHeads: some forwards name a region and others do not.")
        whole = {name: gather(values) for name, values in parts.items()}
        score = whole.get(self.by)
        if score is None:
            score = whole["weight"] * whole["concentration"]
        return Scores(self.name, tower, layers, score, details=whole)


def _measured(
    seen: Any, tower: str, spans: Mapping[str, Tensor], last: Tensor
) -> dict[str, Tensor]:
    """Weight, concentration and region, each (rows, layers, heads)."""
    shares = by_sample(seen, "share", tower)  # (rows, layers, heads, queries, spans)
    row = torch.arange(len(shares))
    at = last.long().argmax(-1)
    own = shares[row, :, :, at]  # (rows, layers, heads, spans)
    names = list(spans)
    spread = by_sample(seen, "given", tower)
    image = spans["image"][:, None, None, : spread.shape[-1]]
    part = torch.where(image, spread.nan_to_num(0.0), 0.0)
    mass = part.sum(-1, keepdim=True)
    p = torch.where(mass > 0, part / mass, 0.0)
    most = image.sum(-1).double().log()
    entropy = -torch.xlogy(p, p).sum(-1)
    # One image token leaves nothing to spread over: all of it is in one place.
    concentration = torch.where(most > 0, 1 - entropy / most, 1.0)
    concentration = torch.where(mass[..., 0] > 0, concentration, 0.0)
    found = {"weight": own[..., names.index("image")], "concentration": concentration}
    if "region" in names:
        found["region"] = own[..., names.index("region")]
    return found


def places(
    model: nn.Module, inputs: Mapping[str, Any], given: Mapping[str, Any] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Booleans (rows, tokens) of the image and region, and of the last token of each row."""
    from attnbias.hub import spans as spans_of

    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        raise AttnbiasError(
            f"VisualHeads needs forwards with input_ids, got {', '.join(inputs) or 'nothing'}."
        )
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask
    counts = real.long().sum(-1)
    size = int(counts.max())
    if given is None:
        own = spans_of(model, inputs)
        parts = [_booleans(s, counts, size) for n, s in own.items() if n[-1].isdigit()]
        found = {"image": torch.stack(parts).any(0)} if parts else {}
    else:
        found = {n: _booleans(s, counts, size) for n, s in given.items() if n in _KNOWN}
    image = found.get("image")
    if image is None or not bool(image.any(-1).all()):
        raise AttnbiasError("VisualHeads: a row of the data holds no image token.")
    return found, torch.arange(size, device=ids.device) == counts[:, None] - 1


_KNOWN = ("image", "region")


def _booleans(span: Any, counts: Tensor, size: int) -> Tensor:
    """A span as `observe` takes it, as (rows, tokens)."""
    at = torch.arange(size, device=counts.device)
    if isinstance(span, Tensor):
        rows = span if span.ndim == 2 else span[None]
        wide = torch.nn.functional.pad(rows, (0, max(size - rows.shape[1], 0)))[:, :size]
        return wide.expand(len(counts), -1) & (at < counts[:, None])
    pairs = span if isinstance(span, list) else [span] * len(counts)
    found = []
    for row, count in zip(pairs, counts.tolist(), strict=True):
        start, stop = (0, 0) if row is None else row
        found.append((at >= start) & (at < (count if stop is None else stop)))
    return torch.stack(found)


def stages(layers: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The layers of the early, middle and late stage: published ends for 32 and 40, else thirds."""
    count = len(layers)
    first, second = STAGES.get(count, (round(count / 3), round(2 * count / 3)))
    return tuple(layers[:first]), tuple(layers[first:second]), tuple(layers[second:])


def stage_top(scores: Scores, stage: int, count: int) -> tuple[Head, ...]:
    """The heads with the highest scores in a stage (0 early, 1 middle, 2 late)."""
    return tuple(_stage(scores, stage, count)[:count])


def stage_others(scores: Scores, stage: int, heads: Sequence[Head], seed: int = 0) -> list[Head]:
    """As many other heads of the same stage, drawn by a seed: the control of a masking."""
    rest = [head for head in _stage(scores, stage, len(heads)) if head not in set(heads)]
    if len(rest) < len(heads):
        raise AttnbiasError(
            f"stage {stage} has {len(rest)} other heads and {len(heads)} are asked for."
        )
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return sorted(rest[n] for n in order[: len(heads)].tolist())


def _stage(scores: Scores, stage: int, count: int) -> list[Head]:
    if stage not in (0, 1, 2):
        raise AttnbiasError(f"stage must be 0 (early), 1 (middle) or 2 (late), got {stage!r}.")
    inside = set(stages(scores.layers)[stage])
    found = [head for head in scores.ranked() if head[0] in inside]
    if not 1 <= count <= len(found):
        raise AttnbiasError(f"stage {stage} has {len(found)} heads, and {count} are asked for.")
    return found
