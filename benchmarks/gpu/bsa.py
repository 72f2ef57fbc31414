"""(b) The distance kernel of biased scan attention: radial bases in space and time, training.

    python -m benchmarks.gpu.bsa [--rehearse] [--minutes M]

Batch 32, 4 heads of 32 and 64, 128 to 4,096 points in the plane with times, five radial basis
functions in space and three in time, all learned; bfloat16. The authors published times of their
JAX scan and of FlexAttention at heads of 64 on another card (RTX 4090): what goals of the backward
are held against, divided by how much faster this card multiplies in bfloat16 (its rate measured in
this run, theirs as listed): the strictest of the rates to scale by.

Source: Jenson et al., "Scalable Spatiotemporal Inference with Biased Scan Attention Transformer
Neural Processes", 2025, arXiv 2506.09163; times from the tests in the authors' package dl4bi.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Goal, Group, Result, filled, of_case, over_flash
from benchmarks.gpu.radial_kinds import SCAN

SCRIPT = "bsa"
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
BATCH, HEADS, SIZES = 32, 4, (64, 32)
FLEX_AT = (512, 2048)
# Seconds of the backward by length, heads of 64, on an RTX 4090; its products in bfloat16 with
# sums in float32, dense, as listed.
SCAN_S = {128: 1.85e-4, 256: 5.3e-4, 512: 3.38e-3, 1024: 1.7e-2, 2048: 8.99e-2, 4096: 0.342}
FLEX_S = {128: 1.02e-2, 256: 2.45e-2, 512: 8.58e-2, 1024: 0.389, 2048: 1.087, 4096: 4.292}
CARD = 165.2e12


def times_faster(published: dict[int, float]) -> Callable[[Result, Result], float | None]:
    """The published backward, scaled to this card, over ours."""

    def value(group: Result, payload: Result) -> float | None:
        ours = group["lines"].get("ours", {}).get("backward")
        rate = payload["ceilings"].get("bfloat16")
        if ours is None or not rate:
            return None
        return published[group["case"]["queries"]] * CARD / float(rate) / float(ours["median_s"])

    return value


def _published(case: Result) -> bool:
    return filled(case) and case["size"] == 64 and case["queries"] >= 1024


def _long(case: Result) -> bool:
    return filled(case) and bool(case["queries"] >= 1024)


GOALS = (
    Goal("RBF in space and time, forward", 1.5, over_flash("forward"), _long),
    Goal("backward, times faster than the JAX scan", 10.0, times_faster(SCAN_S), _published, True),
    Goal("backward, times faster than FlexAttention's published", 100.0, times_faster(FLEX_S),
         _published, True),
    MEMORY,
)  # fmt: skip


def case(length: int, size: int, device: Device) -> Case:
    return Case(
        SCRIPT, SCAN, device.name, BATCH, HEADS, length, size,
        flex=length in FLEX_AT and size == 64, dense=length <= 2048,
    )  # fmt: skip


def groups(rehearse: bool = False) -> list[Group]:
    if rehearse:
        return [of_case(lambda d: Case(SCRIPT, SCAN, d.name, 2, 1, 20, 16))]
    return [
        of_case(partial(case, n, size), 1 if n in (1024, 4096) and size == 64 else 2)
        for size in SIZES
        for n in LENGTHS
    ]


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
