"""A score by the place of the evidence: means of bins, how uneven they are, and how surely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError


class Estimate(NamedTuple):
    """A number with the ends of its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class PositionCurve:
    """Mean scores of equal bins of relative position, and what they say together.

    Attributes:
        centres: ``(bins,)``. values, low, high: ``(bins,)``, the mean of each bin with its
            interval; NaN where a bin is empty. counts: ``(bins,)``.
        score: the mean of the bin means. psi: ``1 - min / max`` of them, 0 is no sensitivity.
        slope: of the least-squares line over the bin centres, per document; pearson, spearman,
            kendall: their correlations. Below 0 is a preference for the beginning.
        chance: what `psi` comes to when the scores of each group are dealt to its positions at
            random: mean, and the ends of its interval. A `psi` inside is no finding.
    """

    centres: Tensor
    values: Tensor
    low: Tensor
    high: Tensor
    counts: Tensor
    score: Estimate
    psi: Estimate
    slope: Estimate
    pearson: Estimate
    spearman: Estimate
    kendall: Estimate
    chance: Estimate

    @property
    def word(self) -> str:
        """What the curve says: primacy or recency where the slope's interval leaves out 0, uneven
        where PSI is beyond chance all the same, else none found."""
        if self.slope.high < 0:
            return "primacy"
        if self.slope.low > 0:
            return "recency"
        return "uneven" if self.psi.value > self.chance.high else "none found"

    def __str__(self) -> str:
        lines = [
            f"position bias: {self.word}; PSI {self.psi}, by chance {self.chance}, "
            f"slope {self.slope}, score {self.score}"
        ]
        for at, value, low, high in zip(
            *(t.tolist() for t in (self.centres, self.values, self.low, self.high)), strict=True
        ):
            lines.append(f"  {at:.3f}: {value:.3g} [{low:.3g}, {high:.3g}]")
        return "\n".join(lines)


def position_curve(
    positions: Any,
    scores: Any,
    *,
    bins: int = 20,
    groups: Any = None,
    draws: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> PositionCurve:
    r"""The curve of scores over relative positions, with bootstrap intervals.

    .. math:: \mathrm{PSI} = 1 - \frac{\min_b \bar s_b}{\max_b \bar s_b}

    over the means of the bins that are not empty. Bins are closed on the right, the first on both
    sides. PSI is above 0 by noise alone: `chance` says how much.

    Args:
        positions: ``(samples,)``, relative positions, clipped to 0 to 1. scores: ``(samples,)``.
        bins: how many equal bins (20 in the paper).
        groups: ``(samples,)`` integers: samples that belong together (one fact at many places) are
            drawn together, and dealt among themselves for `chance`; by default every sample is
            drawn by itself, and all are dealt.
        draws: bootstrap draws, and deals. confidence: of the intervals (percentiles). seed: of
            both.

    Raises:
        AttnbiasError: no samples, sizes that do not fit, a number of bins or draws below 1.

    Source: PosIR: Position-Aware Heterogeneous Information Retrieval Benchmark (2026); authors'
    code read: bins, PSI, line and correlations are its own. The intervals and `chance` are ours.
    """
    x = torch.as_tensor(positions, dtype=torch.float64).clamp(0, 1)
    y = torch.as_tensor(scores, dtype=torch.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0:
        raise AttnbiasError(
            f"positions and scores must be as many numbers, got {tuple(x.shape)}, {tuple(y.shape)}."
        )
    if bins < 2 or draws < 1 or not 0 < confidence < 1:
        raise AttnbiasError(
            f"bins must be 2 or more, draws 1 or more and confidence between 0 and 1, got {bins}, "
            f"{draws}, {confidence}."
        )
    names = torch.arange(len(x)) if groups is None else torch.as_tensor(groups)
    if names.shape != x.shape:
        raise AttnbiasError(f"groups must be {len(x)} numbers, got {tuple(names.shape)}.")
    group = torch.unique(names, return_inverse=True)[1]
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    bin_of = torch.bucketize(x, edges[1:-1])
    centres = (edges[1:] + edges[:-1]) / 2

    generator = torch.Generator().manual_seed(seed)
    number = int(group.max()) + 1
    sums = torch.zeros(number, bins, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    sums.index_put_((group, bin_of), y, accumulate=True)
    counts.index_put_((group, bin_of), torch.ones_like(y), accumulate=True)
    drawn = torch.randint(number, (draws, number), generator=generator)
    weight = torch.zeros(draws, number, dtype=torch.float64)
    weight.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    means = _ratio(sums.sum(0), counts.sum(0))[None]
    resampled = _ratio(weight @ sums, weight @ counts)
    tail = (1 - confidence) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = resampled.nanquantile(ends, 0)

    one = group if groups is not None else torch.zeros_like(group)
    dealt = _dealt(y, one, bin_of, bins, draws, generator)
    chance = _psi(dealt)

    def estimate(of: Any) -> Estimate:
        spread = of(resampled).nanquantile(ends)
        return Estimate(float(of(means)[0]), float(spread[0]), float(spread[1]))

    return PositionCurve(
        centres=centres,
        values=means[0],
        low=low,
        high=high,
        counts=counts.sum(0).long(),
        score=estimate(lambda m: m.nanmean(1)),
        psi=estimate(_psi),
        slope=estimate(lambda m: _line(centres, m)[0]),
        pearson=estimate(lambda m: _line(centres, m)[1]),
        spearman=estimate(lambda m: _spearman(centres, m)),
        kendall=estimate(lambda m: _kendall(centres, m)),
        chance=Estimate(float(chance.nanmean()), *chance.nanquantile(ends).tolist()),
    )


def _ratio(sums: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts > 0, sums / counts.clamp_min(1e-300), torch.nan)


def _dealt(
    y: Tensor, group: Tensor, bin_of: Tensor, bins: int, draws: int, generator: torch.Generator
) -> Tensor:
    """``(draws, bins)``: means of the bins with the scores of each group in another order."""
    rows = []
    by_group = group.argsort(stable=True)
    counts = torch.bincount(bin_of, minlength=bins).double()
    for _ in range(draws):
        mixed = torch.rand(len(y), generator=generator).argsort()
        mixed = mixed[group[mixed].argsort(stable=True)]  # groups in order, each of them shuffled
        other = torch.empty_like(y)
        other[by_group] = y[mixed]
        sums = torch.zeros(bins, dtype=torch.float64).index_add_(0, bin_of, other)
        rows.append(_ratio(sums, counts))
    return torch.stack(rows)


def _psi(means: Tensor) -> Tensor:
    least = means.nan_to_num(torch.inf).amin(1)
    most = means.nan_to_num(-torch.inf).amax(1)
    return torch.where(most > 0, 1 - least / most, torch.nan)


def _line(x: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and correlation of each row over x, without its NaN."""
    known = ~means.isnan()
    at = torch.where(known, x, torch.nan)
    dx = at - at.nanmean(1, keepdim=True)
    dy = means - means.nanmean(1, keepdim=True)
    cross, xx, yy = (dx * dy).nansum(1), dx.square().nansum(1), dy.square().nansum(1)
    slope = torch.where(xx > 0, cross / xx.clamp_min(1e-300), torch.nan)
    both = (xx * yy).sqrt()
    return slope, torch.where(both > 0, cross / both.clamp_min(1e-300), torch.nan)


def _ranks(values: Tensor) -> Tensor:
    """Ranks of each row, equal numbers sharing theirs, NaN for NaN."""
    less = (values[:, None, :] < values[:, :, None]).sum(2)
    same = (values[:, None, :] == values[:, :, None]).sum(2)
    return torch.where(values.isnan(), torch.nan, less + (same + 1).double() / 2)


def _spearman(x: Tensor, means: Tensor) -> Tensor:
    known = ~means.isnan()
    at = torch.where(known, x, torch.nan)
    rx, ry = _ranks(at), _ranks(means)
    dx, dy = rx - rx.nanmean(1, keepdim=True), ry - ry.nanmean(1, keepdim=True)
    both = (dx.square().nansum(1) * dy.square().nansum(1)).sqrt()
    return torch.where(both > 0, (dx * dy).nansum(1) / both.clamp_min(1e-300), torch.nan)


def _kendall(x: Tensor, means: Tensor) -> Tensor:
    """Tau-b: pairs in the same order less pairs in the other, over the root of those not tied."""
    up, over = torch.triu_indices(len(x), len(x), 1)
    dx, dy = x[over] - x[up], means[:, over] - means[:, up]
    known = ~dy.isnan()
    agree = (dx.sign() * dy.nan_to_num(0.0).sign() * known).sum(1)
    pairs = known.sum(1).double()
    untied = (known & (dy != 0)).sum(1).double()
    both = (pairs * untied).sqrt()
    return torch.where(both > 0, agree.double() / both.clamp_min(1e-300), torch.nan)
