"""A grid: variants of a model given the same search, over seeds; resumable cell by cell.

A grid's result file holds every cell that was run, which settings each variant was searched over
and which it took, the differences between variants with their intervals, and a *reduced* row: one
small cell over many seeds, whose interval the ordinary tests hold new runs against.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.common import commit, fingerprint, machine, versions, write_json

RESULTS = Path(__file__).parent / "results" / "models"

# Two-sided 95 % points of Student's t, by degrees of freedom.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)

Measure = Callable[[str, Mapping[str, Any], int], Mapping[str, float]]


@dataclass(frozen=True)
class Claim:
    """``better`` falls below ``control`` in a measured number, by at least `margin`.

    Args:
        text: the claim in one sentence.
        number: name of the measured number; `less` says whether less is better.
        better, control: names of variants.
    """

    text: str
    number: str
    better: str
    control: str
    less: bool = True
    margin: float = 0.0


@dataclass(frozen=True)
class Grid:
    """Variants of a model on the same data, each given the same search.

    Args:
        name: of the result file and of `python -m experiments.models NAME`.
        work: the id in the catalogue of the work that the claims are of.
        question: what is asked, in one sentence; `data` says on what.
        variants: names; each is measured under the same settings and seeds.
        search: settings that every variant is tried with on the first `tried` seeds; the one with
            the smallest mean ``"validation"`` is taken for all seeds. One setting: no search.
        measure: ``(variant, setting, seed)`` to numbers by name (plain floats; ``"validation"``
            among them where there is a search). Deterministic for a machine.
        claims: what is compared.
        seeds: at least three.
        reduced: ``seed`` to numbers by name, in a few seconds on one thread: a small row of the
            same experiment, run over `reduced_seeds` when recorded.
        sources: files and folders whose code a cell depends on.
        note: what to know when reading it: departures, what was made smaller.
    """

    name: str
    work: str
    question: str
    data: str
    variants: Sequence[str]
    measure: Measure
    claims: Sequence[Claim]
    search: Sequence[Mapping[str, Any]] = ({},)
    seeds: Sequence[int] = (0, 1, 2)
    tried: int = 1
    reduced: Callable[[int], Mapping[str, float]] | None = None
    reduced_seeds: Sequence[int] = (0, 1, 2, 3, 4, 5)
    sources: Sequence[str] = ("models", "experiments/grid.py")
    note: str = ""

    @property
    def path(self) -> Path:
        return RESULTS / f"{self.name}.json"

    def run(
        self,
        minutes: float = math.inf,
        say: Callable[[str], None] = lambda line: None,
        *,
        path: Path | None = None,
    ) -> dict[str, Any]:
        """Run the cells that are missing, as long as there is time; write and return the result."""
        path = self.path if path is None else path
        stop = time.monotonic() + 60 * minutes
        known = _read(path)
        cells: list[dict[str, Any]] = known.get("cells", [])
        reduced: list[dict[str, Any]] = known.get("reduced", {}).get("rows", [])
        for kind, variant, setting, seed in self._wanted(cells, reduced):
            if time.monotonic() > stop:
                break
            started = time.monotonic()
            say(f"{self.name}: {kind} {variant} {json.dumps(dict(setting))} seed {seed}")
            if kind == "reduced":
                assert self.reduced is not None
                numbers = self.reduced(seed)
            else:
                numbers = self.measure(variant, setting, seed)
            head = {
                **commit(),
                "sources": fingerprint(*self.sources),
                "seconds": round(time.monotonic() - started, 1),
            }
            plain = {name: float(value) for name, value in numbers.items()}
            if kind == "reduced":
                reduced.append({"seed": seed, "numbers": plain, **head})
            else:
                about = {"variant": variant, "setting": dict(setting), "seed": seed}
                cells.append({**about, "numbers": plain, **head})
            write_json(path, self.result(cells, reduced))
        return self.result(cells, reduced)

    def _wanted(
        self, cells: list[dict[str, Any]], reduced: list[dict[str, Any]]
    ) -> Iterable[tuple[str, str, Mapping[str, Any], int]]:
        """What is to be run, in order; reads `cells` again as they grow."""

        def there(variant: str, setting: Mapping[str, Any], seed: int) -> bool:
            key = (variant, dict(setting), seed)
            return any((c["variant"], c["setting"], c["seed"]) == key for c in cells)

        if self.reduced is not None:
            for seed in self.reduced_seeds:
                if all(row["seed"] != seed for row in reduced):
                    yield "reduced", "", {}, seed
        for setting in self.search:
            for variant in self.variants:
                for seed in self.seeds[: self.tried]:
                    if not there(variant, setting, seed):
                        yield "search", variant, setting, seed
        for seed in self.seeds:
            for variant in self.variants:
                taken = self.taken(cells, variant)
                if taken is not None and not there(variant, taken, seed):
                    yield "seed", variant, taken, seed

    def taken(self, cells: list[dict[str, Any]], variant: str) -> Mapping[str, Any] | None:
        """The setting that a variant's search took; None while the search is not complete."""
        if len(self.search) == 1:
            return self.search[0]
        found = []
        for setting in self.search:
            values = {
                cell["seed"]: cell["numbers"]["validation"]
                for cell in cells
                if (cell["variant"], cell["setting"]) == (variant, dict(setting))
            }
            if not set(self.seeds[: self.tried]) <= set(values):
                return None
            found.append((mean(values[seed] for seed in self.seeds[: self.tried]), setting))
        return min(found, key=lambda pair: pair[0])[1]

    def rows(self, cells: list[dict[str, Any]], variant: str) -> dict[int, dict[str, float]]:
        """The numbers of a variant with the setting it took, by seed."""
        taken = self.taken(cells, variant)
        if taken is None:
            return {}
        return {
            cell["seed"]: cell["numbers"]
            for cell in cells
            if cell["variant"] == variant and cell["setting"] == dict(taken)
        }

    def result(self, cells: list[dict[str, Any]], reduced: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything the file holds, from the cells."""
        verdicts = [self.verdict(claim, cells) for claim in self.claims]
        complete = all(set(self.seeds) <= set(self.rows(cells, v)) for v in self.variants)
        means = {}
        for variant in self.variants:
            rows = self.rows(cells, variant)
            names = sorted({name for row in rows.values() for name in row})
            means[variant] = {
                "setting": dict(self.taken(cells, variant) or {}),
                "seeds": sorted(rows),
                **{
                    name: interval([row[name] for row in rows.values() if name in row])
                    for name in names
                },
            }
        return {
            "work": self.work,
            "mark": "shown",
            "passed": complete and all(v["holds"] for v in verdicts),
            "complete": complete,
            "question": self.question,
            "data": self.data,
            "note": self.note,
            "claims": verdicts,
            "means": means,
            "search": [dict(setting) for setting in self.search],
            "seeds": list(self.seeds),
            "seconds": round(sum(row["seconds"] for row in (*cells, *reduced)), 1),
            "command": f"python -m experiments.models {self.name}",
            "commit": (cells or reduced or [commit()])[-1]["commit"],
            "environment": {"machine": machine(), "versions": versions()},
            "reduced": {"bounds": bounds(reduced), "rows": reduced},
            "cells": cells,
        }

    def verdict(self, claim: Claim, cells: list[dict[str, Any]]) -> dict[str, Any]:
        """A claim, seed by seed: the gain over the control, its interval, whether it holds."""
        better, control = self.rows(cells, claim.better), self.rows(cells, claim.control)
        both = sorted(set(better) & set(control) & set(self.seeds))
        sign = 1.0 if claim.less else -1.0
        gains = [sign * (control[s][claim.number] - better[s][claim.number]) for s in both]
        found = interval(gains)
        low = found["low"]
        holds = len(both) == len(self.seeds) and low is not None and low > claim.margin
        return {"claim": claim.text, **_plain(claim), "gain": found, "holds": holds}


def _plain(claim: Claim) -> dict[str, Any]:
    return {
        "number": claim.number,
        "better": claim.better,
        "control": claim.control,
        "less_is_better": claim.less,
        "margin": claim.margin,
    }


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95 % interval by Student's t; no interval of fewer than two values."""
    if not values:
        return {"mean": None, "low": None, "high": None, "count": 0}
    if len(values) == 1:
        return {"mean": values[0], "low": None, "high": None, "count": 1}
    free = len(values) - 1
    point = _STUDENT[free - 1] if free <= len(_STUDENT) else 2.0
    half = point * stdev(values) / math.sqrt(len(values))
    return {
        "mean": mean(values),
        "low": mean(values) - half,
        "high": mean(values) + half,
        "count": len(values),
    }


def bounds(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Where a new run of the reduced row must lie: four standard deviations around its mean."""
    names = sorted({name for row in rows for name in row["numbers"]})
    found = {}
    for name in names:
        values = [row["numbers"][name] for row in rows]
        if len(values) >= 3:
            half = 4 * stdev(values)
            found[name] = (mean(values) - half, mean(values) + half)
    return found


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found
