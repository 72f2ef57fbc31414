"""The case that every statistic inherits: two functions supplied, the rest follows.

A new statistic subclasses `StatisticCase`, gives `build()` and `dense(map)`, and is then held
against whole maps: hand-made calls with every kind of mask, and the stock eager maps of real and
tiny models.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias import native
from attnbias.observe.observer import Observer
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic, measure
from attnbias.observe.tiles import tiles
from tests.observe import models
from tests.observe.calls import DenseMap, FakeCall, dense_of, random_call

SPANS: dict[str, Any] = {"first": (0, 3), "middle": [(5, 9), (4, 12)], "rest": (2, None)}

ROUTES = ("swept", "fused", "tiles")  # "swept" is "fused" where numba is missing
# For each query position two keys up to it: a fixed pattern, with holes.
TARGETS: dict[str, Tensor] = {
    "near": torch.stack(
        [
            torch.arange(64) * 3 // 5 % 17,
            torch.where(torch.arange(64) % 4 == 0, -1, torch.arange(64)),
        ],
        -1,
    )[None]
}

CALLS: dict[str, dict[str, Any]] = {
    "everything visible": {"masks": ""},
    "causal": {},
    "causal, one row": {"batch": 1},
    "one token": {"queries": 1},
    "left padding": {"padding": "left"},
    "right padding": {"padding": "right", "masks": ""},
    "window": {"masks": "window", "padding": "left"},
    "two-sided window": {"masks": "both"},
    "packed": {"masks": "causal packed"},
    "packed and padded": {"masks": "causal packed", "padding": "left"},
    "fewer queries": {"queries": 17, "keys": 40},
    "fewer queries, window, padding": {
        "queries": 17,
        "keys": 40,
        "masks": "window",
        "padding": "left",
    },
    "mask function": {"masks": "function"},
    "position bias": {"masks": "causal relative"},
    "sinks": {"sink": True},
    "sinks, packed, padded": {"sink": True, "masks": "causal packed", "padding": "left"},
    "no grouped keys": {"groups": 4},
    "one key head": {"groups": 1},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "long": {"queries": 300, "batch": 1, "heads": 2, "size": 16, "sharp": 0.5},
}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, relative for numbers above one; NaN in the same places."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    error = ((got - want).abs() / want.abs().clamp_min(1)).nan_to_num(0.0)
    assert float(error.max()) <= tolerance, f"off by {float(error.max()):.2e}"


class StatisticCase(ABC):
    """Inherit, supply `build` and `dense`."""

    @abstractmethod
    def build(self) -> Statistic:
        """A small instance."""

    @abstractmethod
    def dense(self, whole: DenseMap) -> Tensor:
        """The values by another route: (batch, head, ...) from the whole map."""

    # Hand-made calls --------------------------------------------------------------------------

    def values(
        self, call: FakeCall, extra: ab.Bias | None = None, *, route: str = "swept"
    ) -> Tensor:
        """The values of one call through an observer."""
        fused = route != "tiles"
        observer = Observer([self.build()], spans=spans_for(call), targets=TARGETS, fused=fused)
        observer.few = 0
        with native.disabled() if route == "fused" else nullcontext():
            observer.see(call, extra, call.query, None)  # type: ignore[arg-type]
        return observer.seen.tensor(self.build().label).values[0, 0]

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("name", CALLS)
    def test_equals_the_whole_map(self, name: str, route: str) -> None:
        call = random_call(**CALLS[name])
        whole = dense_of(call, spans=spans_for(call))
        close(self.values(call, route=route), self.dense(whole))

    def test_leaving_the_mask_out_would_fail(self) -> None:
        call = random_call(padding="left")
        want = self.dense(dense_of(call, spans=spans_for(call)))
        call.bias = None
        got = self.values(call)
        assert float((got - want).abs().nan_to_num(0.0).max()) > 1e-2

    @pytest.mark.parametrize("kind", ["key", "hide", "dense"])
    def test_sees_the_edit(self, kind: str) -> None:
        call = random_call(padding="left")
        weight = torch.randn(2, 4, 40)
        weight[:, :, 3:9] += 4  # the first and the fifth token of both rows
        if kind == "hide":
            weight[:, :, 7] = -torch.inf
        extra: ab.Bias = ab.KeyBias(weight)
        if kind == "dense":
            extra = ab.Dense(torch.randn(2, 4, 40, 40) + weight[:, :, None])
        want = self.dense(dense_of(call, extra, spans=spans_for(call)))
        plain = self.dense(dense_of(call, spans=spans_for(call)))
        assert float((plain - want).abs().nan_to_num(0.0).max()) > 1e-2
        for route in ROUTES:
            close(self.values(call, extra, route=route), want)

    @pytest.mark.parametrize("name", ["left padding", "two-sided window", "sinks"])
    def test_any_tiling_and_merging_is_the_same(self, name: str) -> None:
        call = random_call(**CALLS[name])
        scene = Scene(call, spans=spans_for(call), targets=TARGETS)  # type: ignore[arg-type]
        statistic = self.build()
        whole = statistic.start(scene)
        for tile in tiles(scene, rows=1000):
            whole.update(tile)
        for rows, cols in ((1, None), (7, 5), (16, 40), (40, 1)):
            states = [statistic.start(scene) for _ in range(3)]
            pieces = list(tiles(scene, rows=rows, cols=cols))
            order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(rows))
            for turn, place in enumerate(order.tolist()):
                states[turn % 3].update(pieces[place])
            for other in states[1:]:
                states[0].merge(other)
            close(states[0].result(), whole.result())

    def test_shares_its_calls_with_other_statistics(self) -> None:
        call = random_call(padding="left")
        others = [s for s in every() if s.label != self.build().label]
        scene = Scene(call, spans=spans_for(call), targets=TARGETS)  # type: ignore[arg-type]
        together = measure(scene, [*others, self.build()])[-1]
        alone = measure(
            Scene(call, spans=spans_for(call), targets=TARGETS),  # type: ignore[arg-type]
            [self.build()],
        )[0]
        close(together, alone)

    def test_rows_of_a_batch_do_not_touch_each_other(self) -> None:
        call = random_call(padding="left")
        before = self.values(call)
        call.query[1] += 1
        call.key[1] *= 2
        after = self.values(call)
        assert torch.equal(before[0].nan_to_num(0.0), after[0].nan_to_num(0.0))

    # Models -----------------------------------------------------------------------------------

    @pytest.mark.parametrize("route", ROUTES)
    @pytest.mark.parametrize("name", models.SCENARIOS)
    def test_equals_the_eager_maps(
        self, name: str, route: str, request: pytest.FixtureRequest
    ) -> None:
        scenario = models.scenario(name, request)
        with native.disabled() if route == "fused" else nullcontext():
            seen = scenario.observe(
                [self.build()], scenario.spans, targets=TARGETS, fused=route != "tiles"
            )
        for tower, wholes in scenario.maps().items():
            got = seen.tensor(self.build().label, tower=tower)
            assert got.labels["layer"] == list(range(len(wholes)))
            for layer, whole in enumerate(wholes):
                close(got.values[0, layer], self.dense(whole), scenario.tolerance)


def spans_for(call: FakeCall) -> dict[str, Any]:
    """The spans for a call's batch size."""
    batch = call.query.shape[0]
    rows = SPANS["middle"]
    return {**SPANS, "middle": [rows[b % 2] for b in range(batch)]}


def every() -> list[Statistic]:
    """One of each statistic of the library."""
    s = ab.statistics
    return [
        s.Received(),
        s.Received("queries"),
        s.Received("visible"),
        s.Entropy(),
        s.FirstToken(),
        s.SinkRate(),
        s.Distance(),
        s.Share(),
        s.Offset(),
        s.At("near", count=2),
        s.Peak(),
        s.Given("middle"),
        s.WindowedDistance(),
        s.FutureInfluence(),
    ]
