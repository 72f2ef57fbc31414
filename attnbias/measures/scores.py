"""The scores of the heads of one tower: per sample, with mean, error, ranking and files."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    from attnbias.observe.table import Table

Head = tuple[int, int]


@dataclass(frozen=True)
class Scores:
    """One number for each sample and head.

    Attributes:
        name: of the measure. tower: of the model.
        layers: the number of the layer of each row, counted from 0 inside the tower.
        samples: ``(samples, layers, heads)`` float64; NaN where a head does not exist or a sample
            says nothing of it.
        control: the same for the measure's own control (shuffled, other heads), where it has one.
        details: whatever else the measure reports, as plain values and tensors.
    """

    name: str
    tower: str
    layers: tuple[int, ...]
    samples: Tensor
    control: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples.ndim != 3 or self.samples.shape[1] != len(self.layers):
            raise AttnbiasError(
                f"Scores.samples must be (samples, {len(self.layers)} layers, heads), got "
                f"{tuple(self.samples.shape)}."
            )

    @property
    def values(self) -> Tensor:
        """``(layers, heads)``: the mean over the samples."""
        return self.samples.nanmean(0)

    @property
    def error(self) -> Tensor:
        """``(layers, heads)``: standard error of the mean; NaN where there is one sample."""
        return _error(self.samples)

    @property
    def heads(self) -> list[Head]:
        """``(layer, head)`` of every head that has a score."""
        known = ~self.values.isnan()
        return [(self.layers[int(row)], int(column)) for row, column in known.nonzero()]

    def of(self, layer: int, head: int) -> float:
        """The mean score of one head."""
        if layer not in self.layers or not 0 <= head < self.samples.shape[2]:
            raise AttnbiasError(f"{self.name} has no layer {layer}, head {head}.")
        return float(self.values[self.layers.index(layer), head])

    def ranked(self) -> list[Head]:
        """All heads, the highest score first; equal scores in the order of layer and head."""
        return sorted(self.heads, key=lambda head: (-self.of(*head), head))

    def top(self, count: int) -> tuple[Head, ...]:
        """The `count` heads with the highest scores, as a rule's ``heads=`` takes them."""
        if not 1 <= count <= len(self.heads):
            raise AttnbiasError(f"top(count) must be 1 to {len(self.heads)}, got {count}.")
        return tuple(self.ranked()[:count])

    def above(self, threshold: float) -> tuple[Head, ...]:
        """The heads with a score over a threshold, the highest first."""
        return tuple(head for head in self.ranked() if self.of(*head) > threshold)

    def others(self, heads: Sequence[Head], seed: int = 0) -> tuple[Head, ...]:
        """As many heads outside of `heads`, drawn by a seed: the control of an ablation."""
        rest = [head for head in self.heads if head not in set(heads)]
        if len(rest) < len(heads):
            raise AttnbiasError(
                f"others(heads): there are {len(rest)} other heads and {len(heads)} are asked for."
            )
        order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
        return tuple(sorted(rest[n] for n in order[: len(heads)].tolist()))

    def table(self) -> Table:
        """Rows of tower, layer, head, statistic (the measure's name), value."""
        from attnbias.observe.table import Row, Table

        rows = [
            Row(self.tower, layer, head, self.name, self.of(layer, head))
            for layer, head in self.heads
        ]
        return Table(rows, {"measure": self.name, "samples": len(self.samples)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as ``.csv`` or ``.json``, whole or not at all."""
        self.table().save(path)

    def _repr_html_(self) -> str:
        """For notebooks: the scores layer by layer and the highest heads, without a script."""
        from attnbias.observe.display import heads

        top = self.ranked()[:5]
        told = "; ".join(f"layer {a}, head {b}: {self.of(a, b):.3g}" for a, b in top)
        rows = [
            (str(layer), line)
            for layer, line in zip(self.layers, self.values.tolist(), strict=True)
        ]
        title = f"{self.name} ({self.tower}), mean of {len(self.samples)} samples"
        return heads(title, rows, f"Highest: {told}")

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.tower}), {len(self.samples)} samples; highest heads:"]
        for layer, head in self.ranked()[:10]:
            error = float(self.error[self.layers.index(layer), head])
            more = "" if math.isnan(error) else f" ± {error:.2g}"
            lines.append(f"  layer {layer}, head {head}: {self.of(layer, head):.4g}{more}")
        return "\n".join(lines)


def _error(samples: Tensor) -> Tensor:
    count = (~samples.isnan()).sum(0)
    spread = (samples - samples.nanmean(0)).square().nansum(0)
    return torch.where(count > 1, (spread / (count - 1).clamp_min(1) / count).sqrt(), torch.nan)


def gather(parts: Sequence[Tensor]) -> Tensor:
    """Samples of several forwards ``(batch, layers, heads)`` as one tensor, NaN-padded in heads."""
    heads = max(part.shape[-1] for part in parts)
    padded = [
        torch.nn.functional.pad(part.double(), (0, heads - part.shape[-1]), value=torch.nan)
        for part in parts
    ]
    return torch.cat(padded)
