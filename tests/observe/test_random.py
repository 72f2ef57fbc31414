"""Random problems in float64: fused, tiles and the whole map agree to nine digits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.observe.observer import Observer
from attnbias.observe.scene import Scene
from attnbias.observe.sweep import Sweep, fits
from tests.cases.statistic import close, every, spans_for
from tests.observe import test_statistics as cases
from tests.observe.calls import FakeCall, dense_of, random_call

ROUTES = {
    case().build().label: case()
    for case in (
        cases.TestReceived,
        cases.TestReceivedOverQueries,
        cases.TestReceivedOverVisible,
        cases.TestEntropy,
        cases.TestFirstToken,
        cases.TestDistance,
        cases.TestShare,
    )
}


def spans_of(call: FakeCall) -> dict[str, Any]:
    """The spans for the call's rows, of which there may be three."""
    spans = spans_for(call)
    if call.key_positions.shape[0] == 3:
        spans["middle"] = [(5, 9), (4, 12), (0, 2)]
    return spans


def problem(seed: int) -> tuple[FakeCall, ab.Bias | None, str]:
    """A call, an edit, and its words; every option is drawn."""
    draw = random.Random(seed)
    keys = draw.choice([1, 2, 7, 33, 60])
    masks = draw.sample(["causal", "window", "both", "packed", "function", "relative"], k=2)
    options: dict[str, Any] = {
        "batch": draw.choice([1, 2, 3]),
        "heads": 4,
        "groups": draw.choice([1, 2, 4]),
        "queries": draw.choice([keys, keys, max(keys // 3, 1)]),
        "keys": keys,
        "size": draw.choice([3, 8, 20]),
        "masks": " ".join(masks[: draw.choice([0, 1, 1, 2])]),
        "padding": draw.choice([None, "left", "right"]) if keys > 6 else None,
        "sink": draw.random() < 0.3,
    }
    call = random_call(seed=seed, **options)
    call.query, call.key = call.query.double(), call.key.double()
    extra: ab.Bias | None = None
    kind = draw.choice(["none", "none", "key", "hide", "rank"])
    gen = torch.Generator().manual_seed(seed)
    if kind in ("key", "hide"):
        weight = torch.randn(4, keys, generator=gen, dtype=torch.float64)
        if kind == "hide" and keys > 2:
            weight[1:, keys // 2] = -torch.inf
        extra = ab.KeyBias(weight)
    if kind == "rank":
        groups = torch.arange(keys)[None, None] % 2
        rows = torch.randn(1, 4, options["queries"], 2, generator=gen, dtype=torch.float64)
        extra = ab.Bucketed(rows, None, groups)
    return call, extra, f"{seed}: {options}, {kind}"


@pytest.mark.parametrize("part", range(10))
def test_three_routes_agree(part: int) -> None:
    for seed in range(part * 15, part * 15 + 15):
        call, extra, words = problem(seed)
        spans = spans_of(call)
        whole = dense_of(call, extra, spans)
        for fused in (True, False):
            found = [one for one in every() if one.label in ROUTES]
            observer = Observer(found, spans=spans, fused=fused)
            observer.few = 0
            observer.see(call, extra, call.query, None)  # type: ignore[arg-type]
            for one in found:
                got = observer.seen.tensor(one.label).values[0, 0]
                try:
                    close(got, ROUTES[one.label].dense(whole), 1e-9)
                except AssertionError as error:
                    raise AssertionError(f"{one.label}, fused={fused}, {words}: {error}") from None


@pytest.mark.parametrize("part", range(6))
def test_the_compiled_sweep_agrees(part: int) -> None:
    for seed in range(part * 25, part * 25 + 25):
        call, extra, words = problem(seed)
        spans = spans_of(call)
        whole = dense_of(call, extra, spans)
        found = [case.build() for case in ROUTES.values()]
        call.query, call.key = call.query.float(), call.key.float()
        observer = Observer(found, spans=spans)
        observer.few = 0
        observer.see(call, extra, call.query, None)  # type: ignore[arg-type]
        for one in found:
            got = observer.seen.tensor(one.label).values[0, 0]
            try:
                close(got, ROUTES[one.label].dense(whole), 2e-5)
            except AssertionError as error:
                raise AssertionError(f"{one.label}, {words}: {error}") from None


def test_the_sweep_in_many_tiles_and_threads() -> None:
    """More rows and keys than a tile holds; heads alone and together; one thread and two."""
    call = random_call(queries=700, keys=5000, batch=1, heads=3, groups=1, masks="causal")
    scene = Scene(call)  # type: ignore[arg-type]
    wanted = {"columns", "inner", "gap", "peak", "features"}
    feature = torch.randn(1, 5000, 3)
    if not fits(scene):
        pytest.skip("compiled loops: the extra native is not installed")
    p = dense_of(call).p.nan_to_num(0.0)[..., 4300:, :]
    near = (torch.arange(4300, 5000)[:, None] - torch.arange(5000)).abs().double()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            top = count + 1
            found = Sweep(scene, wanted, feature, top)
            first = Sweep(scene, {"peak"})
            assert found.peak is not None
            assert found.place is not None
            assert found.inner is not None
            assert found.gap is not None
            assert found.features is not None
            assert first.peak is not None
            assert first.place is not None
            close(found.columns, p.sum(-2))
            close(found.features, p @ feature[:, None].double())
            close(found.gap, (p * near).sum(-1), 2e-5)
            close(found.inner, -torch.xlogy(p, p).sum(-1))
            weights, places = p.topk(top, -1)
            close(found.peak, weights)
            assert (found.place == places).float().mean() > 0.999  # near ties round either way
            assert torch.equal(found.place[..., :1], first.place)
            assert torch.equal(found.peak[..., :1], first.peak)
    finally:
        torch.set_num_threads(threads)
