"""(d) The car of a neural solver: 32,186 points, squared distance with a weight for each query.

    python -m benchmarks.gpu.solver [--rehearse] [--minutes M]

8 heads of 16, points in space, the weights learned; forward and backward, bfloat16 and float16.
The matrix of biases would be 33 GB in float32.

Source: Wu et al., "FlashBias: Fast Computation of Attention with Bias", 2025, arXiv 2505.12044, the
experiment on solvers of partial differential equations.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Group, of_case
from benchmarks.gpu.radial_kinds import SOLVER

SCRIPT = "solver"
POINTS, HEADS, SIZE = 32_186, 8, 16
GOALS = (MEMORY,)


def case(points: int, dtype: str, device: Device) -> Case:
    return Case(SCRIPT, SOLVER, device.name, 1, HEADS, points, SIZE, dtype=dtype)


def groups(rehearse: bool = False) -> list[Group]:
    if rehearse:
        return [of_case(partial(case, 21, "float16"))]
    return [
        of_case(partial(case, POINTS, kind), n) for n, kind in ((1, "bfloat16"), (3, "float16"))
    ]


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
