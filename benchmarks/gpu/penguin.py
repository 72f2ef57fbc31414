"""(h) PENGUIN's shapes: short series in very many channels, a group of heads for each period.

    python -m benchmarks.gpu.penguin [--rehearse] [--minutes M]

Periods of 24 and 168 and a group without, 6 query heads on 3 key heads of 16, causal, bfloat16;
336 and 720 steps; 32 series of 7 channels (ETTh1) and of 321 (Electricity). Six heads are ours: the
number in the authors' scripts was not seen.

Source: "PENGUIN: Enhancing Transformer with Periodic-Nested Group Attention for Long-term Time
Series Forecasting", 2025, arXiv 2508.13773.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Goal, Group, filled, of_case, over_flash
from benchmarks.gpu.kinds import PENGUIN

SCRIPT = "penguin"
HEADS, GROUPS, SIZE = 6, 3, 16
CHANNELS = {"ETTh1": 7, "Electricity": 321}
SERIES, LENGTHS = 32, (336, 720)
GOALS = (
    # The goal of relative biases; nothing is learned here.
    Goal("relative, both passes", 1.3, over_flash("both"), filled),
    MEMORY,
)


def case(batch: int, length: int, label: str, device: Device) -> Case:
    return Case(
        SCRIPT, PENGUIN, device.name, batch, HEADS, length, SIZE, groups=GROUPS, causal=True,
        label=label,
    )  # fmt: skip


def groups(rehearse: bool = False) -> list[Group]:
    if rehearse:
        return [of_case(partial(case, 1, 20, "tiny"))]
    return [
        of_case(partial(case, SERIES * channels, n, label), 1 if n == 336 else 2)
        for label, channels in CHANNELS.items()
        for n in LENGTHS
    ]


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
