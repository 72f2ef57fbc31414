"""Results of the GPU suite as a card would give them."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.case import Case


def cell(ratio: float, **more: Any) -> dict[str, Any]:
    error = {"output": 1e-3, "key": 1e-3}
    same = {"output": True, "key": True}
    times = {"median_s": 0.001 * ratio}
    made = {"status": "ok", "error": error, "repeats": same, "forward": times, "backward": times}
    return {**made, "ratio": dict.fromkeys(("forward", "backward", "both"), ratio), **more}


def result(case: Case, ratio: float, **more: Any) -> dict[str, Any]:
    lines = {"flash": cell(1.0, memory_both=10), "ours": cell(ratio, memory_both=10, **more)}
    return {"status": "ok", "case": case.describe(), "lines": lines, "floors": {}}
