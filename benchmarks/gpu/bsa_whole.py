"""(c) 1,048,576 test points on 100,000 context points, whole: no slice, nothing projected.

    python -m benchmarks.gpu.bsa_whole [--rehearse] [--minutes M]

4 heads of 32, five radial basis functions of the distance in the plane, forward, bfloat16 and
float32; the bias alone would be 1.7 TB in float32. In each of the model's six blocks the context
attends to itself as well: the goal is on six times both.

Source: Jenson et al., 2025, arXiv 2506.09163, whose headline is under a minute on a 24 GB card.
"""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import MEMORY, Goal, Group, Result, of_case
from benchmarks.gpu.radial_kinds import FIELD

SCRIPT = "bsa_whole"
TEST, CONTEXT, HEADS, SIZE, BLOCKS = 1_048_576, 100_000, 4, 32, 6
ITSELF = "context to itself"
SECONDS = 10.0  # "in seconds", of all blocks


def six_blocks(group: Result, payload: Result) -> float | None:
    """Seconds of six blocks in this format: test points to context, and context to itself."""
    kind = group["case"]["dtype"]
    total = 0.0
    for other in payload["groups"].values():
        case = other.get("case", {})
        if case.get("kind") == FIELD.name and case["dtype"] == kind:
            part = other["lines"].get("ours", {}).get("forward")
            if part is None:
                return None
            total += float(part["median_s"])
    return BLOCKS * total


GOALS = (
    Goal(
        "six blocks, seconds of attention",
        SECONDS,
        six_blocks,
        lambda case: case["label"] != ITSELF,
    ),
    MEMORY,
)


def case(label: str, dtype: str, device: Device, *, tiny: bool = False) -> Case:
    test, context = (36, 25) if tiny else (TEST, CONTEXT)
    itself = label == ITSELF
    return Case(
        SCRIPT, FIELD, device.name, 1, HEADS, context if itself else test, SIZE, keys=context,
        dtype=dtype, training=False, flex=dtype == "bfloat16", dense=False, label=label,
        more={"itself": itself},
    )  # fmt: skip


def groups(rehearse: bool = False) -> list[Group]:
    return [
        of_case(partial(case, label, dtype, tiny=rehearse), 1 if dtype == "bfloat16" else 2)
        for dtype in ("bfloat16", "float32")
        for label in (ITSELF, "test to context")
    ]


if __name__ == "__main__":
    from benchmarks.gpu.__main__ import main

    sys.exit(main(["--only", SCRIPT, *sys.argv[1:]]))
