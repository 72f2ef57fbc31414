"""Means over documents with intervals, added up in one fixed order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from attnbias.observe.sampling import generator

INTERVALS = ("t", "bootstrap")
REPLICATES = 1000


class Means(ABC):
    """Mean, standard error and interval of many numbers at once, from one record after the other.

    Adding the same records in the same order gives the same numbers to the last bit.
    """

    def __init__(self) -> None:
        self.count = torch.zeros(0, dtype=torch.float64)
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._square = torch.zeros(0, dtype=torch.float64)

    def add(self, document: int, values: Tensor) -> None:
        """Take in the values of one document, float64, NaN where it says nothing."""
        self._grow(len(values))
        here = ~values.isnan()
        self.count += here
        step = torch.where(here, values - self._mean, 0.0)
        self._mean += step / self.count.clamp_min(1)
        self._square += step * torch.where(here, values - self._mean, 0.0)
        self._more(document, values, here)

    @property
    def mean(self) -> Tensor:
        """The mean over the documents that have a value."""
        return torch.where(self.count > 0, self._mean, torch.nan)

    @property
    def error(self) -> Tensor:
        """Its standard error; NaN where fewer than two documents have a value."""
        freedom = torch.where(self.count > 1, self.count - 1, torch.nan)
        return (self._square / freedom / self.count).sqrt()

    @abstractmethod
    def interval(self, confidence: float) -> tuple[Tensor, Tensor]:
        """The ends of the confidence interval of the mean."""

    def _grow(self, size: int) -> None:
        for name in ("count", "_mean", "_square"):
            old: Tensor = getattr(self, name)
            setattr(self, name, torch.nn.functional.pad(old, (0, size - len(old))))

    def _more(  # noqa: B027 - the moments may be enough
        self, document: int, values: Tensor, here: Tensor
    ) -> None:
        """What an interval needs beside the moments."""


class TMeans(Means):
    r"""Student's interval: ``mean ± t_{n-1} s / sqrt(n)`` with n documents."""

    def interval(self, confidence: float) -> tuple[Tensor, Tensor]:
        counts = self.count.tolist()
        known = {n: t_quantile((1 + confidence) / 2, int(n) - 1) for n in set(counts) if n > 1}
        reach = self.error * torch.tensor([known.get(n, math.nan) for n in counts]).double()
        return self.mean - reach, self.mean + reach


class BootstrapMeans(Means):
    """The percentile interval of the bootstrap over documents, 1,000 replicates.

    Each replicate counts each document a Poisson(1) number of times, drawn from the seed and the
    index of the document: the same whoever measured it, and O(replicates) memory for each number
    instead of O(documents) (after Chamandy et al., "Estimating Uncertainty for Massive Data
    Streams", 2012; known from its abstract).
    """

    def __init__(self, seed: int = 0, replicates: int = REPLICATES) -> None:
        super().__init__()
        self.seed, self.replicates = seed, replicates
        self._weight = torch.zeros(0, replicates, dtype=torch.float64)
        self._sum = torch.zeros(0, replicates, dtype=torch.float64)

    def _grow(self, size: int) -> None:
        super()._grow(size)
        for name in ("_weight", "_sum"):
            old: Tensor = getattr(self, name)
            setattr(self, name, torch.nn.functional.pad(old, (0, 0, 0, size - len(old))))

    def _more(self, document: int, values: Tensor, here: Tensor) -> None:
        ones = torch.ones(self.replicates, dtype=torch.float64)
        times = torch.poisson(ones, generator(self.seed, document))
        self._weight += here[:, None] * times
        self._sum += torch.where(here, values, 0.0)[:, None] * times

    def interval(self, confidence: float) -> tuple[Tensor, Tensor]:
        if len(self.count) == 0:
            return self.mean, self.mean
        means = self._sum / torch.where(self._weight > 0, self._weight, torch.nan)
        ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
        low, high = torch.nanquantile(means, ends, dim=1)
        enough = self.count > 1
        return torch.where(enough, low, torch.nan), torch.where(enough, high, torch.nan)


def t_quantile(probability: float, freedom: int) -> float:
    """The quantile (over one half) of Student's distribution, to about 1e-10."""
    low, high = 0.0, 1.0
    while t_below(high, freedom) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if t_below(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def t_below(t: float, freedom: int) -> float:
    """The probability that Student's t stays below a number of 0 or more."""
    x = freedom / (freedom + t * t)
    return 1 - _beta(x, freedom / 2, 0.5) / 2


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function, by its continued fraction (modified Lentz)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):
        return 1 - _beta(1 - x, b, a)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d)
            c = 1 + numerator / c
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * total / a
