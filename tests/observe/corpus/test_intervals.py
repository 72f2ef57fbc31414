"""Means, errors and intervals beside numpy and scipy, and what the intervals promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from attnbias.observe.corpus.intervals import BootstrapMeans, Means, TMeans, t_quantile


def filled(means: Means, values: torch.Tensor) -> Means:
    for document, row in enumerate(values):
        means.add(document, row)
    return means


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 99, 10_000])
@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.9995])
def test_quantiles_are_those_of_scipy(probability: float, freedom: int) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom))


def test_moments_and_interval_beside_numpy_with_holes() -> None:
    values = 1e6 + torch.randn(30, 5, dtype=torch.float64)
    values[3:9, 1] = math.nan
    values[:, 2] = math.nan
    values[1:, 3] = math.nan
    means = filled(TMeans(), values)
    low, high = means.interval(0.9)
    for column in (0, 1, 4):
        have = values[:, column][~values[:, column].isnan()].numpy()
        error = have.std(ddof=1) / len(have) ** 0.5
        want = stats.t.interval(0.9, len(have) - 1, have.mean(), error)
        assert int(means.count[column]) == len(have)
        assert float(means.mean[column]) == pytest.approx(have.mean(), rel=1e-15)
        assert float(means.error[column]) == pytest.approx(error, rel=1e-7)
        assert (float(low[column]), float(high[column])) == pytest.approx(want, rel=1e-12)
    assert means.mean[2].isnan()
    assert means.mean[3] == values[0, 3]
    assert means.error[3].isnan()
    assert low[3].isnan()


def test_cells_that_come_later_are_counted_from_there() -> None:
    means = TMeans()
    means.add(0, torch.tensor([1.0], dtype=torch.float64))
    means.add(1, torch.tensor([3.0, 5.0], dtype=torch.float64))
    assert means.mean.tolist() == [2.0, 5.0]
    assert means.count.tolist() == [2, 1]


@pytest.mark.parametrize("kind", [TMeans, BootstrapMeans])
def test_the_interval_covers_as_often_as_it_says(kind: type[Means]) -> None:
    """400 corpora of 40 documents: 95% intervals hold the true mean about 95% of the time."""
    draws = torch.randn(40, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    low, high = filled(kind(), 2 + draws).interval(0.95)
    share = float(((low <= 2) & (high >= 2)).double().mean())
    assert 0.91 < share < 0.98
    low, high = filled(kind(), 2 + draws).interval(0.5)
    assert 0.42 < float(((low <= 2) & (high >= 2)).double().mean()) < 0.58


def test_the_bootstrap_is_that_over_documents() -> None:
    values = torch.distributions.Gamma(1.0, 1.0).sample((50, 3)).double()
    low, high = filled(BootstrapMeans(), values).interval(0.95)
    rng = np.random.default_rng(0)
    for column in range(3):
        want = stats.bootstrap(
            (values[:, column].numpy(),), np.mean, method="percentile", random_state=rng,
            n_resamples=2000,
        ).confidence_interval  # fmt: skip
        width = want.high - want.low
        assert float(low[column]) == pytest.approx(want.low, abs=0.15 * width)
        assert float(high[column]) == pytest.approx(want.high, abs=0.15 * width)


def test_the_bootstrap_does_not_depend_on_what_is_measured_beside() -> None:
    values = torch.randn(20, 4, dtype=torch.float64)
    whole = filled(BootstrapMeans(), values).interval(0.95)
    alone = filled(BootstrapMeans(), values[:, :2]).interval(0.95)
    assert torch.equal(whole[0][:2], alone[0])
    other = filled(BootstrapMeans(seed=1), values).interval(0.95)
    assert not torch.equal(whole[0], other[0])
