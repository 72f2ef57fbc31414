"""(e) Swin v2's windows of 24, 64 images of 384 pixels: a table of displacements and its gradient.

    python -m benchmarks.gpu.swin [--rehearse] [--minutes M]

The first three stages of the base model (4, 8, 16 heads of 32; 16, 4 and 1 windows of 576 tokens an
image), plain and shifted by half a window; bfloat16, the table learned. The attention alone: scores
are scaled products, where the model scales cosines.

Source: Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution", 2022, arXiv
2111.09883; the case as in FlashBias, arXiv 2505.12044.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Goal, Group, Result, filled, of_case, over_flash
from benchmarks.gpu.kinds import SWIN

SCRIPT = "swin"
IMAGES, WINDOW, SIZE = 64, 24, 32
STAGES = ((1, 96, 4), (2, 48, 8), (3, 24, 16))  # number, side of the grid, heads


def _plain(case: Result) -> bool:
    return filled(case) and not case["label"].endswith("shifted")


GOALS = (
    # The goal of relative biases with the gradient of their table; segments cut shifted windows.
    Goal("table with its gradient, both passes", 1.3, over_flash("both"), _plain),
    MEMORY,
)


def case(
    stage: int, grid: int, heads: int, shifted: bool, images: int, window: int, device: Device
) -> Case:
    more = {"window": window, "grid": grid, "shift": window // 2 if shifted else 0}
    return Case(
        SCRIPT, SWIN, device.name, images * (grid // window) ** 2, heads, window**2, SIZE,
        label=f"stage {stage}{', shifted' if shifted else ''}", more=more,
    )  # fmt: skip


def groups(rehearse: bool = False) -> list[Group]:
    if rehearse:
        return [of_case(partial(case, 1, 8, 2, shifted, 1, 4)) for shifted in (False, True)]
    return [
        of_case(
            partial(case, stage, grid, heads, shifted, IMAGES, WINDOW),
            1 if stage == 1 else 2,
        )
        for stage, grid, heads in STAGES
        for shifted in (False, True)
        if not shifted or grid > WINDOW
    ]


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
