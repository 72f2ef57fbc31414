"""One case: every line checked against float64, then timed by turns, forward and backward apart."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Parameters, counts, floors
from benchmarks.gpu.device import Device, turns
from benchmarks.gpu.lines import FLEX, FLOOR, LINES, OURS, Forward, Line, failure, fatal
from benchmarks.gpu.truth import Answer, answer, errors, gap, sparse
from benchmarks.timing import Timing

Say = Callable[[str], None]
WALLS = 3  # calls whose whole duration is measured


class Lost(RuntimeError):
    """The device is lost to this process, and with it the case; `line` did it."""

    def __init__(self, line: str, error: BaseException) -> None:
        super().__init__(f"{line}: {failure(error)['reason']}")
        self.line = line


class Way:
    """A line on the tensors of a case: its calls, each on leaves of its own."""

    def __init__(
        self, line: Line, case: Case, device: Device, inputs: tuple[Tensor, ...],
        parameters: Parameters,
    ) -> None:  # fmt: skip
        self.line, self.case = line, case
        self.trains = case.training and not (device.rehearsal and line.name == FLEX)
        self.gradient = inputs[3]
        self.given = dict(parameters)
        self.leaves: dict[str, Tensor] = {}
        for name, tensor in zip(("query", "key", "value"), inputs, strict=False):
            self.leaves[name] = tensor.detach().requires_grad_(self.trains)
        if line.biased and line.learns and self.trains:
            for name in case.kind.learned:
                self.leaves[name] = parameters[name].detach().clone().requires_grad_()
                self.given[name] = self.leaves[name]
        self.forward_function: Forward
        self.forward_function, self.notes = line.build(case, device, parameters)

    def graph(self) -> Tensor:
        """The output, with its graph where the case trains."""
        leaves = self.leaves
        with torch.set_grad_enabled(self.trains):
            return self.forward_function(
                leaves["query"], leaves["key"], leaves["value"], self.given
            )

    def forward(self) -> Tensor:
        """The output alone."""
        leaves = self.leaves
        with torch.no_grad():
            q, k, v = (leaves[name].detach() for name in ("query", "key", "value"))
            return self.forward_function(q, k, v, self.given)

    def backward(self, output: Tensor, gradient: Tensor | None = None) -> dict[str, Tensor]:
        step = self.gradient if gradient is None else gradient
        found = torch.autograd.grad(output, list(self.leaves.values()), step)
        return dict(zip(self.leaves, found, strict=True))

    def both(self) -> None:
        self.backward(self.graph())


def measure(
    case: Case,
    device: Device,
    *,
    budget: float,
    ceilings: Mapping[str, float],
    say: Say,
    skip: Collection[str] = (),
) -> dict[str, Any]:
    """The group of a case. `say` hears each line's name before it runs for the first time; lines in
    `skip` ended a process before.
    """
    begin = time.perf_counter()
    inputs = case.inputs()
    parameters = case.kind.draw(case)
    cells: dict[str, dict[str, Any]] = {}
    ways: dict[str, Way] = {}
    truths: dict[bool, Answer] = {}
    for line in LINES:
        if not line.wanted(case):
            continue
        if line.name in skip:
            words = "the process died, or hung, in this line"
            cells[line.name] = {"status": "failed", "reason": words}
            continue
        say(line.name)
        if line.biased not in truths:
            truths[line.biased] = answer(case, inputs, parameters, biased=line.biased)
        try:
            way = Way(line, case, device, inputs, parameters)
            cells[line.name] = {"status": "ok", **way.notes}
            cells[line.name] |= checked(way, device, truths[line.biased])
            ways[line.name] = way
        except Exception as error:
            if fatal(error):
                raise Lost(line.name, error) from error
            cells[line.name] = failure(error)
        gc.collect()
        device.empty()
    timed(ways, device, budget, cells)
    out = {"case": case.describe(), "lines": cells, **needed(case, parameters, ceilings)}
    if True in truths and False in truths:
        out["bias_left_out"] = gap(truths[False].output, truths[True].output)
    return {"status": "ok", **out, "seconds": round(time.perf_counter() - begin, 1)}


def needed(case: Case, parameters: Parameters, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """Operations and bytes of ours and of unbiased attention, and seconds at the card's rates."""
    needs = {OURS: counts(case, parameters), FLOOR: counts(case, {}, biased=False)}
    passes = ("forward", "backward") if case.training else ("forward",)
    return {
        "needs": needs[OURS],
        "floors": {
            name: {part: floors(need[part], ceilings, case.dtype) for part in passes}
            for name, need in needs.items()
        },
    }


def checked(way: Way, device: Device, want: Answer) -> dict[str, Any]:
    """Errors, bits of two runs, peak memory, and what a caller waits for."""
    begin = time.perf_counter()
    output = way.graph()
    slopes = way.backward(output, sparse(way.case, way.gradient)) if way.trains else {}
    device.wait()
    found: dict[str, Any] = {"first_s": round(time.perf_counter() - begin, 3)}
    found["error"] = errors(way.case, want, output, slopes)
    del output, slopes
    found["repeats"] = repeats(way)
    found["memory_forward"] = device.peak(way.forward)
    walls = range(1 if device.rehearsal else WALLS)
    found["wall_forward_s"] = short(min(device.wall(way.forward) for _ in walls))
    if way.trains:
        found["memory_both"] = device.peak(way.both)
        found["wall_both_s"] = short(min(device.wall(way.both) for _ in walls))
    return found


def repeats(way: Way) -> dict[str, bool]:
    """Whether two runs have the same bits: of the output, and of each gradient."""
    runs = []
    for _ in range(2):
        output = way.graph()
        slopes = way.backward(output) if way.trains else {}
        runs.append({"output": output.detach(), **slopes})
        del output, slopes
    one, two = runs
    return {name: torch.equal(one[name], two[name]) for name in one}


def timed(
    ways: dict[str, Way], device: Device, budget: float, cells: dict[str, dict[str, Any]]
) -> None:
    """Times and ratios into the cells: forward, backward alone, and their sum."""

    def on_error(name: str, error: Exception) -> None:
        if fatal(error):
            raise Lost(name, error) from error
        cells[name] |= failure(error)

    forward = {name: (None, lambda _, way=way: way.forward()) for name, way in ways.items()}
    found: dict[str, dict[str, Timing]] = {}
    share = budget / 2 if any(way.trains for way in ways.values()) else budget
    found["forward"] = turns(device, forward, budget=share, on_error=on_error)
    backward = {
        name: (way.graph, lambda output, way=way: way.backward(output))
        for name, way in ways.items()
        if way.trains and cells[name]["status"] == "ok"
    }
    if backward:
        found["backward"] = turns(device, backward, budget=share, on_error=on_error)
    for name in ways:
        times = {part: timings[name] for part, timings in found.items() if name in timings}
        for part, timing in times.items():
            cells[name][part] = {
                "median_s": short(timing.median),
                "low_s": short(timing.low),
                "high_s": short(timing.high),
                "rounds": len(timing.samples),
            }
        with contextlib.suppress(KeyError):
            cells[name]["ratio"] = ratios(times, {p: t[FLOOR] for p, t in found.items()})


def ratios(times: Mapping[str, Timing], floor: Mapping[str, Timing]) -> dict[str, float]:
    """Medians over the floor's: forward, backward, and ``both``, the sums of the two."""
    found = {part: round(timing.median / floor[part].median, 4) for part, timing in times.items()}
    if len(times) == 2:
        whole, least = (sum(t.median for t in parts.values()) for parts in (times, floor))
        found["both"] = round(whole / least, 4)
    return found


def short(value: float) -> float:
    return float(f"{value:.4g}")
