"""(f) T5's buckets of distance with the gradient of their table, 512 to 32,768 tokens.

    python -m benchmarks.gpu.t5 [--rehearse] [--minutes M]

8 heads of 64, 32 buckets, both directions; as many sequences as make 32,768 tokens, bfloat16; one
size in float16 and float32, and causal.

Source: Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", 2020, arXiv 1910.10683.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Goal, Group, Result, filled, of_case, over_flash
from benchmarks.gpu.kinds import T5

SCRIPT = "t5"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
TOKENS, HEADS, SIZE = 32_768, 8, 64
FLEX_AT = (512, 4096)


def _half(case: Result) -> bool:
    return filled(case) and case["dtype"] != "float32"


GOALS = (
    Goal("relative with its table's gradient, both passes", 1.3, over_flash("both"), _half),
    MEMORY,
)


def case(length: int, dtype: str, causal: bool, device: Device) -> Case:
    return Case(
        SCRIPT, T5, device.name, max(TOKENS // length, 1), HEADS, length, SIZE, dtype=dtype,
        causal=causal, flex=length in FLEX_AT, label="causal" if causal else "",
    )  # fmt: skip


def _tiny(causal: bool, device: Device) -> Case:
    label = "causal" if causal else ""
    return Case(SCRIPT, T5, device.name, 1, 1, 35, 16, causal=causal, label=label)


def groups(rehearse: bool = False) -> list[Group]:
    if rehearse:
        return [of_case(partial(_tiny, causal)) for causal in (False, True)]
    plain = [
        of_case(partial(case, n, "bfloat16", False), 1 if n in (2048, 32768) else 2)
        for n in LENGTHS
    ]
    others = [("bfloat16", True), ("float16", False), ("float32", False)]
    return plain + [of_case(partial(case, 4096, kind, causal), 2) for kind, causal in others]


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
