"""Each statistic against its dense route, through the inherited case."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.observe.observer import Observer
from tests.cases.statistic import TARGETS, StatisticCase, close
from tests.observe.calls import DenseMap, dense_of, random_call

s = ab.statistics


def present(values: Tensor, real: Tensor) -> Tensor:
    return values.masked_fill(~real, torch.nan)


class TestReceived(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Received()

    def dense(self, whole: DenseMap) -> Tensor:
        # A key that is there but that no counted query sees has received nothing.
        return present(whole.p.nansum(-2), whole.has_key)


class TestReceivedOverQueries(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Received("queries")

    def dense(self, whole: DenseMap) -> Tensor:
        queries = whole.real.sum(-1, keepdim=True)
        return present(whole.p.nansum(-2), whole.has_key) / queries


class TestReceivedOverVisible(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Received("visible")

    def dense(self, whole: DenseMap) -> Tensor:
        counts = whole.visible.sum(-2)
        return present(whole.p.nansum(-2) / counts, (counts > 0) & whole.has_key)


class TestEntropy(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Entropy()

    def dense(self, whole: DenseMap) -> Tensor:
        p = whole.p.nan_to_num(0.0)
        return present(-torch.xlogy(p, p).sum(-1), whole.real)


class TestFirstToken(StatisticCase):
    def build(self) -> s.Statistic:
        return s.FirstToken()

    def dense(self, whole: DenseMap) -> Tensor:
        return present(whole.p[..., 0], whole.real)


class TestSinkRate(StatisticCase):
    def build(self) -> s.Statistic:
        return s.SinkRate(threshold=0.2)

    def dense(self, whole: DenseMap) -> Tensor:
        return sink_rate(whole, 0.2, 0)


class TestSinkRateOfAnotherToken(StatisticCase):
    def build(self) -> s.Statistic:
        return s.SinkRate(threshold=0.02, token=5)

    def dense(self, whole: DenseMap) -> Tensor:
        return sink_rate(whole, 0.02, 5)


def sink_rate(whole: DenseMap, threshold: float, token: int) -> Tensor:
    if token >= whole.p.shape[-1]:
        return torch.full(whole.p.shape[:2], torch.nan)
    seen = whole.visible[..., token]
    share = torch.where(seen, whole.p[..., token].nan_to_num(0.0), 0.0).sum(-1)
    count = seen.sum(-1)
    return (share / count > threshold).double().masked_fill(count == 0, torch.nan)


class TestDistance(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Distance()

    def dense(self, whole: DenseMap) -> Tensor:
        rows, columns = (torch.arange(n) for n in whole.p.shape[-2:])
        gap = (rows[:, None] - columns[None]).abs()
        return present((whole.p.nan_to_num(0.0) * gap).sum(-1), whole.real)


class TestShare(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Share()

    def dense(self, whole: DenseMap) -> Tensor:
        p = whole.p.nan_to_num(0.0)
        sums = []
        for span in whole.spans.values():
            rows = span if isinstance(span, list) else [span] * len(p)
            parts = [p[b, ..., start:stop].sum(-1) for b, (start, stop) in enumerate(rows)]
            sums.append(present(torch.stack(parts), whole.real))
        return torch.stack(sums, -1)


class TestShareOfOneSpan(TestShare):
    def build(self) -> s.Statistic:
        return s.Share(("middle",))

    def dense(self, whole: DenseMap) -> Tensor:
        return super().dense(replace(whole, spans={"m": whole.spans["middle"]}))


class TestOffset(StatisticCase):
    by = -1

    def build(self) -> s.Statistic:
        return s.Offset(self.by)

    def dense(self, whole: DenseMap) -> Tensor:
        keys = torch.arange(whole.p.shape[-2]) + self.by
        at = keys[:, None].expand(*whole.p.shape[:2], -1, 1)
        return picked(whole, at)[..., 0]


class TestOffsetOfThree(TestOffset):
    by = -3


class TestAt(StatisticCase):
    def build(self) -> s.Statistic:
        return s.At("near", count=2)

    def dense(self, whole: DenseMap) -> Tensor:
        table = torch.nn.functional.pad(TARGETS["near"][0], (0, 0, 0, 400), value=-1)
        return picked(whole, table[: whole.p.shape[-2]].expand(*whole.p.shape[:2], -1, -1))


def picked(whole: DenseMap, at: Tensor) -> Tensor:
    """Entries of the map at (B, H, Q, T) key positions; NaN where the row has no such key."""
    there = (at >= 0) & (at < whole.p.shape[-1])
    safe = torch.where(there, at, 0)
    exists = (
        whole.has_key.expand(*whole.p.shape[:2], -1)[:, :, None]
        .expand(*safe.shape[:3], -1)
        .gather(-1, safe)
    )
    return whole.p.gather(-1, safe).masked_fill(
        ~(there & exists & whole.real[..., None]), torch.nan
    )


class TestPeak(StatisticCase):
    count = 1

    def build(self) -> s.Statistic:
        return s.Peak(self.count)

    def dense(self, whole: DenseMap) -> Tensor:
        p = whole.p.nan_to_num(0.0)
        found = []
        for _ in range(self.count):
            weight = p.amax(-1, keepdim=True)
            near = (p >= weight * (1 - 1e-6)).long().argmax(-1)  # float32 cannot tell them apart
            found += [weight[..., 0], torch.where(weight[..., 0] > 0, near.double(), torch.nan)]
            p = p.scatter(-1, near[..., None], 0.0)
        return present(torch.stack(found, -1), whole.real[..., None])


class TestPeakOfThree(TestPeak):
    count = 3


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_peak_has_one_key_or_more(count: object) -> None:
    with pytest.raises(ab.AttnbiasError, match=r"Peak\(count\) must be a whole number from 1"):
        s.Peak(count)  # type: ignore[arg-type]


def test_each_row_of_a_batch_has_targets_of_its_own() -> None:
    call = random_call(padding="left")
    generator = torch.Generator().manual_seed(3)
    at = torch.randint(-1, 30, (2, 40, 3), generator=generator)
    at = torch.minimum(at, torch.arange(40)[:, None])
    observer = Observer([s.At("own", count=3)], targets={"own": at})
    observer.see(call, None, call.query, None)  # type: ignore[arg-type]
    got = observer.seen.tensor("at").values[0, 0]
    p = dense_of(call).p
    for row in range(2):
        for query in range(p.shape[2]):
            for turn in range(3):
                place = int(at[row, query, turn])
                want = p[row, :, query, place] if place >= 0 else torch.full((4,), torch.nan)
                close(got[row, :, query, turn], want)
