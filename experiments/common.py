"""An experiment: an effect beside its control over seeds, and the file that records it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import commit, machine, versions, write_json

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Experiment:
    """One claim of one work, measured on our data beside a control of the same size.

    Args:
        work: the work's id in the catalogue.
        claim: what is tested, in one sentence.
        control: what the effect is held against, in one sentence.
        measure: one run for a seed: numbers by name; ``"effect"`` and ``"control"`` are compared,
            more is better (give the negative of what should fall).
        seeds: at least three.
    """

    work: str
    claim: str
    control: str
    measure: Callable[[int], Mapping[str, float]]
    seeds: Sequence[int] = (0, 1, 2, 3, 4)

    def run(self, tick: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Measure every seed. Passed: the mean gain over the control is above twice its error."""
        start = time.monotonic()
        rows = []
        for seed in self.seeds:
            rows.append({name: float(value) for name, value in self.measure(seed).items()})
            tick()
        gains = [row["effect"] - row["control"] for row in rows]
        error = stdev(gains) / math.sqrt(len(gains))
        return {
            "work": self.work,
            "mark": "shown",
            "passed": mean(gains) > 2 * error and mean(gains) > 0,
            "claim": self.claim,
            "control": self.control,
            "gain": mean(gains),
            "error": error,
            "seeds": list(self.seeds),
            "rows": rows,
            "seconds": round(time.monotonic() - start, 1),
        }


def record(experiment: Experiment, result: dict[str, Any]) -> Path:
    """Write a result with its command and environment; returns the file."""
    path = RESULTS / f"{experiment.work.replace('-', '_')}.json"
    RESULTS.mkdir(exist_ok=True)
    head = {
        "command": f"python -m experiments {experiment.work}",
        **commit(),
        "environment": {"machine": machine(), "versions": versions()},
    }
    write_json(path, {**result, **head})
    return path
