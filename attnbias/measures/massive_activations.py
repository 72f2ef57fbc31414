"""Massive activations: few entries of the residual stream, far beyond all others."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures._residual import residual
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import Heads, Rule


@dataclass(frozen=True)
class Activation:
    """One massive activation: where it stands, and its value."""

    sample: int
    layer: int
    position: int
    dimension: int
    value: float


@dataclass(frozen=True)
class Massive:
    """What `MassiveActivations` found.

    Attributes:
        tower: of the model. layers: its layers. samples: how many there were.
        largest: ``(samples, layers, count)``: the largest magnitudes of each hidden state, the
            greatest first; NaN where it has fewer entries.
        median: ``(samples, layers)``: the median magnitude.
        found: every massive activation, by sample, layer, position and dimension.
        size, ratio: the thresholds.
    """

    tower: str
    layers: tuple[int, ...]
    largest: Tensor
    median: Tensor
    found: tuple[Activation, ...]
    size: float
    ratio: float

    @property
    def samples(self) -> int:
        return len(self.median)

    @property
    def ratios(self) -> Tensor:
        """``(samples, layers)``: the largest magnitude over the median one."""
        return self.largest[..., 0] / self.median

    @property
    def dimensions(self) -> dict[int, int]:
        """Feature dimension -> how many massive activations stand in it, the most first."""
        return dict(Counter(one.dimension for one in self.found).most_common())

    @property
    def positions(self) -> dict[int, int]:
        """Token position -> how many massive activations stand there, the most first."""
        return dict(Counter(one.position for one in self.found).most_common())

    @property
    def span(self) -> tuple[int, int] | None:
        """The first and the last layer after which there is one; None where there is none."""
        where = [one.layer for one in self.found]
        return (min(where), max(where)) if where else None

    def means(self, layer: int) -> dict[int, tuple[float, float]]:
        """Dimension -> mean value at the first token and at later ones; NaN where there is none.

        The source keeps the two apart: their values differ, each is nearly constant.
        """
        values: dict[int, tuple[list[float], list[float]]] = {}
        for one in self.found:
            if one.layer == layer:
                values.setdefault(one.dimension, ([], []))[one.position > 0].append(one.value)
        return {
            dimension: (_mean(first), _mean(later))
            for dimension, (first, later) in sorted(values.items())
        }

    def replacing(self, how: Literal["zero", "mean"], layer: int | None = None) -> Rule:
        """A rule that sets the massive activations after one layer to zero or to their mean.

        Args:
            how: ``"zero"``, or ``"mean"`` over the samples measured (see `means`).
            layer: by default the first that has one, as in the source.

        Raises:
            AttnbiasError: there is none after that layer.
        """
        if how not in ("zero", "mean"):
            raise AttnbiasError(f"how must be 'zero' or 'mean', got {how!r}.")
        layer = self.span[0] if layer is None and self.span else layer
        means = {} if layer is None else self.means(layer)
        if layer is None or not means:
            place = "any layer" if layer is None else f"layer {layer}"
            raise AttnbiasError(
                f"no activation after {place} is massive (above {self.size:g} and {self.ratio:g} "
                "times the median): there is nothing to replace."
            )
        entries = tuple((dimension, *pair) for dimension, pair in means.items())
        return _Replace(
            layers=(layer,),
            towers=(self.tower,),
            entries=tuple((d, 0.0, 0.0) for d, *_ in entries) if how == "zero" else entries,
            size=self.size,
            ratio=self.ratio,
        )

    def __str__(self) -> str:
        most = float(self.ratios.nan_to_num(0.0).max()) if self.samples else 0.0
        if not self.found:
            return (
                f"No massive activation in {self.samples} samples ({self.tower}); the largest is "
                f"{most:.4g} times the median."
            )
        first, last = self.span or (0, 0)
        return (
            f"{len(self.found)} massive activations in {self.samples} samples ({self.tower}), "
            f"after layers {first} to {last}, in dimensions "
            f"{', '.join(map(str, list(self.dimensions)[:6]))}, at positions "
            f"{', '.join(map(str, list(self.positions)[:6]))}; up to {most:.4g} times the median."
        )


@dataclass(frozen=True)
class MassiveActivations(Measure):
    r"""Entries of the hidden state that are far larger than all others.

    After each layer, the entry :math:`h_{td}` of a sample's hidden state is massive where

    .. math:: |h_{td}| > \mathrm{size} \quad\text{and}\quad
              |h_{td}| \ge \mathrm{ratio} \cdot \operatorname{median}_{t', d'} |h_{t'd'}|

    with the median over the real tokens of the sample. `measure` returns `Massive`: all of them,
    the largest magnitudes and the median by layer, and by `Massive.replacing` the two
    interventions of the source (to zero, to the mean).

    Args:
        size: least magnitude, published: 100. Small models stay far below: see `Massive.ratios`
            and lower both.
        ratio: how many times the median magnitude, published: about 1000.
        count: how many of the largest magnitudes are kept for each layer, published: 3.
        tower: by default the text tower, else the first.

    Cost: one forward for each entry of the data, and a sort of each hidden state.

    Raises:
        AttnbiasError: no data, thresholds that are not positive. Refused: unknown layers.

    Source: Massive Activations in Large Language Models, 2024 (arXiv 2402.17762); authors' code
    read. The residual stream is read after each layer, as there. Its "at least" and "about" are
    taken as written above. The authors write the mean values of two models into their code, by
    model, dimension and (first or later) token; here `measure` finds them. The learned key and
    value that remove the need for massive activations are a way of training and no part of this.
    """

    name: ClassVar[str] = "massive_activations"
    size: float = 100.0
    ratio: float = 1000.0
    count: int = 3
    tower: str | None = None

    def __post_init__(self) -> None:
        for word in ("size", "ratio"):
            value = getattr(self, word)
            good = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (good and math.isfinite(value) and value >= 0):
                raise AttnbiasError(
                    f"MassiveActivations({word}) must be a number from 0, got {value!r}."
                )
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise AttnbiasError(
                f"MassiveActivations(count) must be a whole number from 1, got {self.count!r}."
            )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Massive:
        given = forwards(data, "MassiveActivations")
        largest: list[Tensor] = []
        medians: list[Tensor] = []
        found: list[Activation] = []
        tower, layers = "", tuple[int, ...]()
        with evaluating(model), bar(len(given), self.name, progress) as tick:
            for inputs in given:
                seen = residual(model, inputs, self.tower)
                tower, layers = seen.tower, seen.layers
                for row, real in enumerate(seen.real):
                    state = seen.hidden[:, row, real]  # (layers, tokens, size)
                    size = state.abs().flatten(1)
                    top = size.topk(min(self.count, size.shape[1])).values
                    padded = torch.full((len(layers), self.count), torch.nan, dtype=top.dtype)
                    padded[:, : top.shape[1]] = top.cpu()
                    middle = size.median(1).values
                    found += self._found(state, middle, layers, len(medians))
                    largest.append(padded)
                    medians.append(middle.cpu())
                tick()
        return Massive(
            tower, layers, torch.stack(largest), torch.stack(medians), tuple(found),
            float(self.size), float(self.ratio),
        )  # fmt: skip

    def _found(
        self, state: Tensor, median: Tensor, layers: tuple[int, ...], sample: int
    ) -> list[Activation]:
        massive = is_massive(state, median[:, None, None], self.size, self.ratio)
        return [
            Activation(
                sample, layers[layer], token, dimension, float(state[layer, token, dimension])
            )
            for layer, token, dimension in massive.nonzero().tolist()
        ]


def is_massive(state: Tensor, median: Tensor, size: float, ratio: float) -> Tensor:
    """Which entries pass both thresholds."""
    return (state.abs() > size) & (state.abs() >= ratio * median)


@dataclass(frozen=True, kw_only=True)
class _Replace(Rule):
    """Massive activations in known dimensions after a layer, set to a value at the first token and
    to another at later ones."""

    heads: Heads = "all"
    entries: tuple[tuple[int, float, float], ...] = field(default=())
    size: float = 100.0
    ratio: float = 1000.0

    hidden_at: ClassVar[tuple[str, ...]] = ("layer",)
    row_local: ClassVar[bool] = False  # the median is over the tokens of one forward

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        new = hidden.clone()
        real = (site.positions >= 0).expand(site.batch, -1)
        for row in range(site.batch):
            if not bool(real[row].any()):
                continue
            state = hidden[row].double()
            median = state[real[row]].abs().median()
            massive = is_massive(state, median, self.size, self.ratio) & real[row][:, None]
            first = site.positions.expand(site.batch, -1)[row] == 0
            for dimension, at_first, later in self.entries:
                value = torch.where(first, at_first, later).to(new)
                # A place where none was seen before has no mean: it is left alone.
                there = massive[:, dimension] & ~value.isnan()
                new[row, :, dimension] = torch.where(there, value, new[row, :, dimension])
        return new


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
