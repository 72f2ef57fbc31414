"""A group: what is measured at once and stored under one key; goals over groups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.gpu.case import Case
from benchmarks.gpu.device import Device

# Largest error over the largest true entry: of the output, of gradients to query, key and value,
# and of gradients to parameters, which are sums over many scores whose parts cancel.
LIMITS = {
    "bfloat16": (2e-2, 4e-2, 8e-2),
    "float16": (4e-3, 1e-2, 2e-2),
    "float32": (2e-4, 1e-3, 2e-3),
}
PLACES = {"output": 0, "query": 1, "key": 1, "value": 1}
FILLED = 32_768  # queries of all units together from which a card is full, and goals are judged

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """What a group is measured with. budget: seconds of timing; say: told what is about to run;
    skip: lines that ended a process before.
    """

    device: Device
    budget: float
    ceilings: Mapping[str, float]
    say: Callable[[str], None]
    skip: Collection[str] = ()


@dataclass(frozen=True)
class Group:
    """script and name make its key; tier: 1 before 2 before 3; size: small before large; about:
    what goals judge by (`Case.describe`).
    """

    script: str
    name: str
    run: Callable[[Context], dict[str, Any]]
    tier: int = 1
    size: float = 0.0
    about: Result = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.script}/{self.name}"


def of_case(make: Callable[[Device], Case], tier: int = 1) -> Group:
    """The group of one attention; `make` takes the device, so that naming it costs nothing."""
    here = make(Device("cpu"))

    def run(context: Context) -> dict[str, Any]:
        from benchmarks.gpu.measure import measure

        return measure(
            make(context.device),
            context.device,
            budget=context.budget,
            ceilings=context.ceilings,
            say=context.say,
            skip=context.skip,
        )

    size = float(here.pairs) * (3 if here.training else 1)
    return Group(here.script, here.name, run, tier, size, here.describe())


@dataclass(frozen=True)
class Goal:
    """A limit on a number of every group that it covers.

    value: the number, or None where it was not measured. covers: judged by the group's
    description (`Case.describe`) alone. at_least: larger is better.
    """

    words: str
    limit: float
    value: Callable[[Result, Result], float | None]
    covers: Callable[[Result], bool]
    at_least: bool = False

    def meets(self, value: float | None) -> bool:
        if value is None:
            return False
        return value >= self.limit if self.at_least else value <= self.limit


def verdicts(script: str, goals: Sequence[Goal], payload: Result) -> list[dict[str, Any]]:
    """What was reached of each goal; a cell that is wrong or does not repeat meets none."""
    found = []
    for goal in goals:
        cells = []
        for key, group in payload["groups"].items():
            if not key.startswith(f"{script}/") or "case" not in group:
                continue
            if not goal.covers(group["case"]):
                continue
            value = goal.value(group, payload)
            why = reason(group)
            held = goal.meets(value) and not why
            number = None if value is None else round(value, 4)
            cells.append({"key": key, "value": number, "met": held, "why": why})
        met = sum(cell["met"] for cell in cells)
        found.append(
            {
                "script": script,
                "goal": goal.words,
                "limit": goal.limit,
                "at_least": goal.at_least,
                "cells": cells,
                "met": met,
                "verdict": "not measured"
                if not cells
                else "holds"
                if met == len(cells)
                else "falls short",
            }
        )
    return found


def reason(group: Result) -> str:
    """Why our line of a group meets no goal whatever its time; empty where it may."""
    cell = group["lines"].get("ours", {"status": "missing"})
    if cell["status"] != "ok":
        return str(cell.get("reason", cell["status"]))
    limits = LIMITS[group["case"]["dtype"]]
    for name, error in cell["error"].items():
        if error > limits[PLACES.get(name, 2)]:
            return f"wrong: {name} is off by {error:.1e}"
    odd = [name for name, same in cell["repeats"].items() if not same]
    return f"two runs differ in {', '.join(odd)}" if odd else ""


def filled(case: Result) -> bool:
    return bool(case["batch"] * case["heads"] * case["queries"] >= FILLED)


def kinds(*names: str) -> Callable[[Result], bool]:
    """Covers these structures where the card is full."""
    return lambda case: filled(case) and case["kind"].startswith(names)


def over_flash(part: str) -> Callable[[Result, Result], float | None]:
    """Our time over unbiased flash attention of the same run: forward, backward or both."""

    def value(group: Result, payload: Result) -> float | None:
        found: float | None = group["lines"].get("ours", {}).get("ratio", {}).get(part)
        return found

    return value


def memory_share(group: Result, payload: Result) -> float | None:
    """Peak memory beyond flash's, in float32 numbers, over ``units (N + M) (R + 1)``."""
    lines = group["lines"]
    name = "memory_both" if group["case"]["training"] else "memory_forward"
    ours, flash = (lines.get(line, {}).get(name) for line in ("ours", "flash"))
    if ours is None or flash is None:
        return None
    return float(ours - flash) / 4 / float(group["case"]["rows_for_memory"])


# O(N (R + 1)) as a number: that many float32 for each query and key and stored number of a unit.
MEMORY = Goal(
    "memory O(N (R + 1)): numbers of 4 bytes beyond flash's peak", 4.0, memory_share, filled
)
