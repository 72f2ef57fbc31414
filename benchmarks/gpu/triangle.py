"""(g) Triangle attention: one pair bias for all rows, read and differentiated once, 256 to 2,048.

    python -m benchmarks.gpu.triangle [--rehearse] [--minutes M]

As many rows as residues, 4 heads of 32, a learned bias ``(1, heads, N, N)`` in float32, bfloat16.

Source: Jumper et al., "Highly accurate protein structure prediction with AlphaFold", 2021,
supplementary algorithms 13 and 14.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Goal, Group, filled, of_case, over_flash
from benchmarks.gpu.kinds import PAIR

SCRIPT = "triangle"
LENGTHS = (256, 384, 512, 768, 1024, 1536, 2048)
HEADS, SIZE = 4, 32
FLEX_AT = (256, 512)
GOALS = (
    Goal("within no bias, forward", 1.2, over_flash("forward"), filled),
    Goal("within no bias, both passes", 1.2, over_flash("both"), filled),
    MEMORY,
)


def case(length: int, device: Device) -> Case:
    return Case(SCRIPT, PAIR, device.name, length, HEADS, length, SIZE, flex=length in FLEX_AT)


def groups(rehearse: bool = False) -> list[Group]:
    if rehearse:
        return [of_case(lambda d: Case(SCRIPT, PAIR, d.name, 2, 1, 20, 16))]
    return [of_case(partial(case, n), 1 if n in (512, 1024) else 2) for n in LENGTHS]


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
