"""The statistics of the preplan-and-anchor rhythm, through the inherited case and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.observe.observer import Observer
from tests.cases.statistic import CALLS, StatisticCase, close, spans_for
from tests.observe.calls import DenseMap, FakeCall, dense_of, random_call

s = ab.statistics


class TestWindowedDistance(StatisticCase):
    window = 4

    def build(self) -> s.Statistic:
        return s.WindowedDistance(self.window)

    def dense(self, whole: DenseMap) -> Tensor:
        rows, columns = (torch.arange(n) for n in whole.p.shape[-2:])
        gap = (rows[:, None] - columns[None]).abs().clamp_max(self.window)
        return (whole.p.nan_to_num(0.0) * gap).sum(-1).masked_fill(~whole.real, torch.nan)


class TestFutureInfluence(StatisticCase):
    low = 2
    high: int | None = 7

    def build(self) -> s.Statistic:
        return s.FutureInfluence(self.low, self.high)

    def dense(self, whole: DenseMap) -> Tensor:
        rows, columns = (torch.arange(n) for n in whole.p.shape[-2:])
        gap = rows[:, None] - columns[None]
        far = 10**6 if self.high is None else self.high
        later = ((gap >= self.low) & (gap <= far))[None, None] & whole.visible
        mass = (whole.p.nan_to_num(0.0) * later).sum(-2)
        count = later.sum(-2)
        return torch.where((count > 0) & whole.has_key, mass / count, torch.nan)


@pytest.mark.parametrize("name", ["causal", "left padding", "two-sided window", "sinks"])
def test_other_parameters(name: str) -> None:
    """A window beyond what is looked up key by key; a range to the end of the text."""
    wide, end = TestWindowedDistance(), TestFutureInfluence()
    wide.window, end.low, end.high = 70, 3, None
    call = random_call(**CALLS[name])
    for case in (wide, end):
        close(case.values(call), case.dense(dense_of(call, spans=spans_for(call))))


def seen_on(p: Tensor, statistic: s.Statistic) -> Tensor:
    """A statistic of a map that is given: scores are its logarithm."""
    size = p.shape[-1]
    positions = torch.arange(size)[None]
    bias = ab.Dense(p.clamp_min(1e-30).log()[None, None])
    query = torch.zeros(1, 1, size, 8)
    call = FakeCall(query, query, bias, positions, positions)
    observer = Observer([statistic])
    observer.see(call, None, call.query, None)  # type: ignore[arg-type]
    return observer.seen.tensor(statistic.name).values[0, 0, 0, 0]


def test_known_maps() -> None:
    size = 12
    diagonal = torch.eye(size)
    assert torch.allclose(seen_on(diagonal, s.WindowedDistance(3)), torch.zeros(size).double())
    uniform = torch.ones(size, size).tril() / torch.arange(1, size + 1)[:, None]
    want = torch.tensor([sum(min(d, 3) for d in range(t + 1)) / (t + 1) for t in range(size)])
    got = seen_on(uniform, s.WindowedDistance(3))
    torch.testing.assert_close(got, want.double(), atol=1e-6, rtol=1e-6)
    influence = seen_on(uniform, s.FutureInfluence(1, 2))
    later = [[1 / (t + 1) for t in range(j + 1, min(j + 3, size))] for j in range(size)]
    want = torch.tensor([sum(x) / len(x) if x else torch.nan for x in later])
    torch.testing.assert_close(influence, want.double(), equal_nan=True, atol=1e-6, rtol=1e-6)
    stripe = torch.zeros(size, size)
    stripe[:, 0] = 1  # everybody looks at the first token
    influence = seen_on(stripe, s.FutureInfluence(1, None))
    assert influence[0] == 1
    assert float(influence[1:-1].abs().max()) < 1e-20


@pytest.mark.parametrize(
    "bad", [{"low": -1}, {"low": 5, "high": 4}, {"low": 1.5}], ids=["below", "crossed", "part"]
)
def test_ranges_are_checked(bad: dict[str, Any]) -> None:
    with pytest.raises(AttnbiasError, match="low"):
        s.FutureInfluence(**bad)
    with pytest.raises(AttnbiasError, match="window"):
        s.WindowedDistance(0)
