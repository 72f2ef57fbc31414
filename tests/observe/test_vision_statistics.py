"""Statistics of vision models against their dense route, through the inherited case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from tests.cases.statistic import StatisticCase
from tests.observe.calls import DenseMap

s = ab.statistics


def within(whole: DenseMap, name: str, length: int) -> Tensor:
    """(B, length) bool: the positions inside a span."""
    span: Any = whole.spans[name]
    rows = span if isinstance(span, list) else [span] * len(whole.p)
    at = torch.arange(length)
    return torch.stack([(at >= a) & (at < (length if b is None else b)) for a, b in rows])


class TestGiven(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Given("rest")

    def dense(self, whole: DenseMap) -> Tensor:
        asks = within(whole, "rest", whole.p.shape[2])
        sums = (whole.p.nan_to_num(0.0) * asks[:, None, :, None]).sum(-2)
        share = sums / sums.sum(-1, keepdim=True)
        return share.masked_fill(~whole.has_key, torch.nan)


def test_given_needs_its_span() -> None:
    with pytest.raises(AttnbiasError, match="needs the span class"):
        s.Given("class").check(("image",))
    with pytest.raises(AttnbiasError, match="name of a span"):
        s.Given("")


GRID = s.Grid(4, 5, 2)  # positions 2 to 21: in every call queries and keys stand outside too


def patches(whole: DenseMap) -> tuple[Tensor, Tensor, Tensor]:
    """Maps as (B, H, Q, K), zero where a query or key is no patch, and both lists of cells."""
    queries, keys = whole.p.shape[2:]
    query = torch.tensor([_cell(n) for n in range(queries)])
    key = torch.tensor([_cell(n) for n in range(keys)])
    inside = (query[:, :1] >= 0) & (key[:, 0] >= 0)
    return whole.p.nan_to_num(0.0) * inside, query, key


def _cell(position: int) -> tuple[int, int]:
    if not 2 <= position < 22:
        return (-1, -1)
    return divmod(position - 2, 5)


class TestGridDistance(StatisticCase):
    def build(self) -> s.Statistic:
        return s.GridDistance(GRID)

    def dense(self, whole: DenseMap) -> Tensor:
        p, query, key = patches(whole)
        gap = torch.cdist(query.double(), key.double()) / 4
        return (p * gap).sum(-1) / p.sum(-1)  # 0 / 0 where nothing is seen


class TestAligned(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Aligned(GRID)

    def dense(self, whole: DenseMap) -> Tensor:
        p, query, key = patches(whole)
        share = (p / p.sum(-1, keepdim=True)).nan_to_num(0.0)
        found = torch.zeros(*p.shape[:2], 7, 9, dtype=torch.float64)
        for down in range(-3, 4):
            for across in range(-4, 5):
                here = (key[None] - query[:, None] == torch.tensor([down, across])).all(-1)
                found[:, :, down + 3, across + 4] = (share * here).sum((-1, -2))
        return found / found.sum((-1, -2), keepdim=True)


class TestHops(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Hops(GRID)

    def dense(self, whole: DenseMap) -> Tensor:
        return rings(whole, lambda gap: gap.amax(-1), 5)


def test_hops_to_each_of_four_neighbours() -> None:
    from attnbias.observe.observer import Observer
    from tests.cases.statistic import close
    from tests.observe.calls import dense_of, random_call

    call = random_call(padding="left")
    observer = Observer([s.Hops(GRID, neighbours=4, each=True)])
    observer.see(call, None, call.query, None)  # type: ignore[arg-type]
    want = rings(dense_of(call), lambda gap: gap.sum(-1), 8, each=True)
    close(observer.seen.tensor("hops").values[0, 0], want)


def rings(whole: DenseMap, steps: Any, count: int, each: bool = False) -> Tensor:
    p, query, key = patches(whole)
    cells = torch.tensor([divmod(n, 5) for n in range(20)])
    rows = whole.p.nan_to_num(0.0)[:, :, query[:, 0] >= 0].sum((-1, -2))
    away = steps((query[:, None] - key[None]).abs())
    found = []
    for ring in range(count):
        like = (steps((query[:, None] - cells).abs()) == ring).sum(-1).clamp_min(1)
        part = (p * (away == ring)).sum(-1) / (like if each else 1)
        found.append(part.sum(-1))
    return torch.stack(found, -1) / rows[..., None]


def planted(grid: s.Grid, kind: str) -> Tensor:
    """(N, N): a class token and patches; every row sums to 1."""
    n = grid.stop
    p = torch.zeros(n, n)
    p[0, 0] = 1
    for i in range(1, n):
        row, column = divmod(i - 1, grid.columns)
        if kind == "itself":
            p[i, i] = 1
        elif kind == "right":
            p[i, i + 1 if column + 1 < grid.columns else 0] = 1
        elif kind == "class":
            p[i, 0] = 1
        else:
            p[i] = 1 / n
        assert float(p[i].sum()) == pytest.approx(1.0)
        assert row < grid.rows
    return p


@pytest.mark.parametrize("kind", ["itself", "right", "class", "even"])
def test_planted_heads_give_their_offset(kind: str) -> None:
    from attnbias.observe.observer import Observer
    from attnbias.observe.statistics.aligned import centre
    from tests.observe.calls import FakeCall

    grid = s.Grid(4, 4)
    want = planted(grid, kind)[None, None]
    n = want.shape[-1]
    call = FakeCall(
        query=torch.zeros(1, 1, n, 8), key=torch.zeros(1, 1, n, 8),
        bias=ab.Dense(want.log()),
        query_positions=torch.arange(n)[None], key_positions=torch.arange(n)[None],
    )  # fmt: skip
    observer = Observer([s.Aligned(grid), s.Hops(grid), s.GridDistance(grid)])
    observer.see(call, None, call.query, None)  # type: ignore[arg-type]
    maps = observer.seen.tensor("aligned").values[0, 0, 0, 0]
    hops = observer.seen.tensor("hops").values[0, 0, 0, 0]
    distance = observer.seen.tensor("grid_distance").values[0, 0, 0, 0]
    if kind == "itself":
        assert maps[3, 3] == pytest.approx(1.0)
        assert hops[0] == pytest.approx(1.0)
        assert distance.nanmean() == pytest.approx(0.0)
    elif kind == "right":
        assert centre(maps).tolist() == pytest.approx([0.0, 1 / 3])
        assert hops[1] == pytest.approx(0.75)  # the last column looks at the class token
        assert distance.nanmean() == pytest.approx(1 / 3)
    elif kind == "even":
        assert centre(maps).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
        assert hops.sum() == pytest.approx(16 / 17, abs=1e-6)
    else:
        assert hops.sum() == pytest.approx(0.0, abs=1e-6)
        assert distance[0].isnan()


def test_images_need_their_grid() -> None:
    for kind in (s.GridDistance, s.Aligned, s.Hops):
        with pytest.raises(AttnbiasError, match="grid of patches"):
            kind()
    with pytest.raises(AttnbiasError, match="4 or 8"):
        s.Hops(GRID, neighbours=6)
    with pytest.raises(AttnbiasError, match="rows"):
        s.Grid(0, 3)
    with pytest.raises(AttnbiasError, match="each of 6"):
        s.Grid(2, 3, 0, order=(0, 1))
