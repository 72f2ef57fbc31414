"""The benchmark of observing: its answers are right, its verdicts can fail."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import observe as bench


def test_every_line_gives_the_right_numbers() -> None:
    for causal in (False, True):
        group = bench.site_group(96, causal, budget=0.0)
        assert set(group["lines"]) == {
            "forward",
            *bench.statistics(),
            "eager, received from its maps",
        }
        for name, cell in group["lines"].items():
            assert cell["status"] == "ok", (name, cell)
            if name in bench.statistics():
                assert cell["error"] <= bench.ERROR_AT_MOST


def test_the_error_is_seen() -> None:
    gen = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 8, 64, 64, generator=gen) for _ in range(3)]
    call = bench.SiteCall(*tensors, bias=None)
    want = bench.truth(call)
    seen = bench.site_lines(call)["received and entropy"]()
    assert bench.error(seen, want) < 1e-5
    want["received"][5] *= 1.001
    assert bench.error(seen, want) > 1e-4


def test_a_goal_is_missed_by_time_or_by_error() -> None:
    def verdict(tokens: int, **cell: Any) -> list[bool]:
        lines = {name: {"status": "ok", **cell} for name in bench.GOALS[tokens]}
        group = {"part": "site", "tokens": tokens, "causal": False, "lines": lines}
        return [found["holds"] for found in bench.verdicts([group])]

    assert verdict(8192, ratio=2.1, error=1e-6) == [True, True, True]
    assert verdict(8192, ratio=2.5, error=1e-6) == [False, True, True]
    assert verdict(8192, ratio=2.1, error=1e-3) == [False, False, False]
    assert verdict(32768, ratio=4.1, error=1e-6) == [False]
    assert bench.verdicts([{"part": "site", "tokens": 64, "causal": False, "lines": {}}]) == []
