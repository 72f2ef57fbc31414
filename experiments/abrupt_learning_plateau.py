"""The loss plateau at the published size: attention progress leads, and its scale sets the length.

About an hour with one thread: each finished training is kept under ``out/plateau`` and read again
by a run that was stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from experiments._plateau import Course, scaled, school
from experiments.common import Experiment

KEPT = Path(__file__).parents[1] / "out" / "plateau"
ELSEWHERE = 8  # of 16 integers: the control scales as many entries, half a list away
# The factors of the work: where, and after how many steps a training stops at the latest (400 and,
# below 1, 2,000 in its files; less here where it is enough that a plateau is longer than another).
# A training ends once 95 of 100 answers are right.
TRAININGS = {
    "1": (1.0, 0, 400),
    "10": (10.0, 0, 400),
    "10_elsewhere": (10.0, ELSEWHERE, 200),
    "2.5": (2.5, 0, 400),
    "0.5": (0.5, 0, 2000),
    "0.2": (0.2, 0, 320),
}
EVERY_SEED = ("1", "10", "10_elsewhere")  # the other factors run with the first seed alone


def trained(seed: int, name: str) -> Course:
    """The course of one training, made now or kept from a run that was stopped."""
    path = KEPT / f"{seed}_{name}.json"
    if not path.exists():
        factor, shift, steps = TRAININGS[name]
        start = time.monotonic()
        course = school(seed, scaled(factor, shift), steps=steps)
        course.seconds = time.monotonic() - start
        KEPT.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".part").write_text(json.dumps(asdict(course)))
        path.with_suffix(".part").replace(path)
    return Course(**json.loads(path.read_text()))


def plateau(course: Course) -> int:
    """The step at which half of the generated answers are right; the last one if they never are."""
    return course.first(course.accuracy, 0.5, course.steps[-1])


def lead(course: Course) -> int:
    """How many steps before the end of the plateau attention has made half of its way."""
    half = (course.progress[0] + course.progress[-1]) / 2
    return plateau(course) - course.first(course.progress, half, course.steps[-1])


def measure(seed: int) -> Mapping[str, float]:
    """How much of the plateau factor 10 takes away, on the right entries and elsewhere."""
    names = tuple(TRAININGS) if seed == 0 else EVERY_SEED
    courses = {name: trained(seed, name) for name in names}
    lengths = {name: plateau(course) for name, course in courses.items()}
    plain = courses["1"]
    half = sum(step < lengths["1"] / 2 for step in plain.steps)
    return {
        "effect": 1 - lengths["10"] / lengths["1"],
        "control": 1 - lengths["10_elsewhere"] / lengths["1"],
        "lead": lead(plain),
        **{f"steps_{name}": float(length) for name, length in lengths.items()},
        "accuracy_elsewhere": courses["10_elsewhere"].accuracy[-1],
        "cosine_at_the_start": plain.cosine[0],
        "cosine_in_the_plateau": plain.cosine[half],
        "cosine_after": plain.cosine[-1],
        "repetition_in_the_plateau": plain.repetition[half],
        "repetition_after": plain.repetition[-1],
        "progress_at_the_start": plain.progress[0],
        "progress_in_the_plateau": plain.progress[half],
        "progress_after": plain.progress[-1],
        "seconds_of_training": sum(course.seconds for course in courses.values()),
    }


EXPERIMENT = Experiment(
    work="abrupt-learning-plateau",
    claim=(
        "One head of linear attention, width 256, Adam at 1e-4 on fresh batches of 256 lists of 16 "
        "integers (moving sums of two modulo 17): scaling the right entries of its map by 10 "
        "during training shortens the loss plateau."
    ),
    control="The same factor on as many entries half a list away (stopped after 200 steps).",
    measure=measure,
    seeds=(0, 1, 2),
)
