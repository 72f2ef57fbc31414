"""Random problems in float64: fused, tiles and the whole map agree to nine digits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.observe.observer import Observer
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
        spans = spans_for(call)
        if call.key_positions.shape[0] == 3:
            spans["middle"] = [(5, 9), (4, 12), (0, 2)]
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
