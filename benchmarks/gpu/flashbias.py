"""(a) FlashBias's grids: factors, ALiBi and key biases, 256 to 16,384 tokens, heads of 32 to 128.

    python -m benchmarks.gpu.flashbias [--rehearse] [--minutes M]

Factors of rank 8 and 16 (batch 2, 4 heads, learned), ALiBi (batch 1, 50 heads, causal), a learned
bias for each key (batch 2, 4 heads); bfloat16, and float16 at one size.

Source: Wu et al., "FlashBias: Fast Computation of Attention with Bias", 2025, arXiv 2505.12044; the
shapes of its kernel benchmark. Theirs are float16, heads of 32, forward and forward with backward.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmarks.gpu.case import Case, Kind
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Goal, Group, kinds, of_case, over_flash
from benchmarks.gpu.kinds import ALIBI, KEY, low_rank

SCRIPT = "flashbias"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
FLEX_AT = (1024, 4096, 16384)
SIZES = (64, 32, 128)
LOW, WIDE = low_rank(8), low_rank(16)
PAPER: dict[str, dict[str, Any]] = {
    "factors": {"batch": 2, "heads": 4},
    "ALiBi": {"batch": 1, "heads": 50, "causal": True},
}
GOALS = (
    Goal("fold of rank up to 16, forward", 1.15, over_flash("forward"), kinds("low rank")),
    Goal("fold of rank up to 16, with backward", 1.2, over_flash("both"), kinds("low rank")),
    Goal("a number for each key, forward", 1.03, over_flash("forward"), kinds("key bias")),
    MEMORY,
)


def case(kind: Kind, length: int, size: int, device: Device, /, **more: Any) -> Case:
    shape = PAPER["ALiBi" if kind is ALIBI else "factors"]
    flex = length in FLEX_AT and kind is not WIDE
    given = {"flex": flex, **shape, **more}
    return Case(SCRIPT, kind, device.name, queries=length, size=size, **given)


def groups(rehearse: bool = False) -> list[Group]:
    if rehearse:
        tiny = {"batch": 1, "heads": 3, "flex": True}
        return [of_case(partial(case, kind, 20, 16, **tiny)) for kind in (LOW, ALIBI, KEY)]
    found = []
    for size in SIZES:
        for kind in (LOW, ALIBI, KEY, WIDE):
            for length in LENGTHS:
                if kind is WIDE and length < 4096:
                    continue
                # First what the goals speak of, at the lengths between.
                tier = 1 if length in (4096, 16384) and size == 64 else 2 if length >= 1024 else 3
                found.append(of_case(partial(_at, kind, length, size, "bfloat16"), tier))
    return [*found, *(of_case(partial(_at, kind, 4096, 64, "float16"), 2) for kind in (LOW, KEY))]


def _at(kind: Kind, length: int, size: int, dtype: str, device: Device) -> Case:
    return case(
        kind, length, size, device, dtype=dtype, flex=length in FLEX_AT and dtype == "bfloat16"
    )


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
