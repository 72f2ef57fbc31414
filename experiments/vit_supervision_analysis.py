"""Offset local heads: what a model of images is taught decides whether it has them."""

from __future__ import annotations

import attnbias as ab
from attnbias.measures import Scores
from experiments._vision import digits, taught
from experiments.common import Experiment

SHOWN = 100
OFFSETS = ((0, 1), (0, -1), (1, 0), (-1, 0))


def looked(seed: int, offset: tuple[int, int], steps: int) -> Scores:
    """The offset heads of a model taught to say what stands at an offset, on test images."""
    _, test = digits(seed)
    model = taught(seed, offset, steps)
    return ab.measures.OffsetHeads().measure(model, [{"pixel_values": test.images[:SHOWN]}])


def measure(seed: int, steps: int = 300) -> dict[str, float]:
    offset = OFFSETS[seed % len(OFFSETS)]
    found, own = looked(seed, offset, steps), looked(seed, (0, 0), steps)
    (best,) = found.top(1)
    peak = found.details["peak"][best].tolist()
    return {
        "effect": float(found.values.amax()),
        "control": float(own.values.amax()),
        "the offset taught is the one found": float(tuple(peak) == offset),
        "distance": float(found.details["distance"].mean()),
        "distance of the control": float(own.details["distance"].mean()),
    }


EXPERIMENT = Experiment(
    work="vit-supervision-analysis",
    claim="A vision transformer taught to say what the neighbour of each patch shows has a head "
    "that gives much of its attention to the neighbour at that offset.",
    control="the same model, born alike, taught as long to say what each patch itself shows",
    measure=measure,
)
