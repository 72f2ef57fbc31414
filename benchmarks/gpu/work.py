"""The process that measures: groups in order, one line of JSON for each step of them."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.gpu.device import Device, open_device
from benchmarks.gpu.group import Context, Group
from benchmarks.gpu.lines import failure, fatal
from benchmarks.gpu.measure import Lost

SCRIPTS = (
    "flashbias", "bsa", "bsa_whole", "solver", "swin", "t5", "triangle", "penguin", "models",
    "seen",
)  # fmt: skip
Tell = Callable[[Mapping[str, Any]], None]
MEASURED = ("attnbias/kernels", "attnbias/lowering", "attnbias/bias", "benchmarks/gpu")


def script(name: str) -> Any:
    return importlib.import_module(f"benchmarks.gpu.{name}")


def all_groups(rehearse: bool, names: Sequence[str] = SCRIPTS) -> dict[str, Group]:
    """Every group by its key: first tiers first, within one small before large."""
    found = [group for name in names for group in script(name).groups(rehearse)]
    found.sort(key=lambda group: (group.tier, group.size))
    return {group.key: group for group in found}


def fingerprint() -> str:
    return common.fingerprint(*MEASURED)


def measure_all(
    todo: Sequence[Group],
    device: Device,
    tell: Tell,
    *,
    budget: float,
    until: float,
    ceilings: Mapping[str, float] | None = None,
    skips: Mapping[str, Sequence[str]] | None = None,
) -> int:
    """Measure groups until the clock says `until` (seconds of `time.time`); how many were left.

    Told: ``ceilings`` once, ``at`` before each line, ``key`` and ``group`` after each group. A
    group is begun only where the longest one of its script so far would end in time.
    """
    if ceilings is None:
        from benchmarks.gpu import ceilings as card

        ceilings = card.measure(device)
        tell({"ceilings": ceilings})
    longest: dict[str, float] = {}
    left = 0
    for group in todo:
        if time.time() + longest.get(group.script, 0.0) > until:
            left += 1
            continue
        begin, started = time.perf_counter(), common.now()

        def say(line: str, key: str = group.key) -> None:
            tell({"at": line, "of": key})

        context = Context(device, budget, ceilings, say, (skips or {}).get(group.key, ()))
        try:
            found = group.run(context)
        except Lost as lost:
            tell({"at": lost.line, "of": group.key})
            tell({"lost": str(lost), "of": group.key})
            raise
        except Exception as error:
            if fatal(error):  # in the line that ran last
                tell({"lost": str(error)[:300], "of": group.key})
                raise Lost("a line before", error) from error
            found = failure(error)
        seconds = time.perf_counter() - begin
        longest[group.script] = max(longest.get(group.script, 0.0), seconds)
        found = {"script": group.script, "started": started, **found}
        tell({"key": group.key, "group": {**found, "seconds": round(seconds, 1)}})
        gc.collect()
        device.empty()
    return left


def worker() -> int:
    """What ``python -m benchmarks.gpu --work`` does: the request on standard input, as JSON."""
    asked = json.load(sys.stdin)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not a result

    def tell(said: Mapping[str, Any]) -> None:
        print(json.dumps(said), file=out, flush=True)

    device = open_device(asked["rehearse"])
    tell({"device": device.describe()})
    groups = all_groups(asked["rehearse"])
    try:
        measure_all(
            [groups[key] for key in asked["keys"]],
            device,
            tell,
            budget=asked["budget"],
            until=asked["until"],
            ceilings=asked["ceilings"],
            skips=asked["skips"],
        )
    except Lost:
        return 3
    return 0
