r"""How the table of measured costs is made: problems, their times, and the fit.

Every structure is measured alone, and the sums that models use, forward, in training and with
gradients to what it stores, in all formats, at sizes drawn by a seed, on every lowering that
offers. The seconds of a count (`attnbias.lowering.effort`) are those that fit the times best:

.. math:: \min_{s \ge 0} \sum_p \Bigl(\log t_p - \log \sum_c s_c\, n_{pc}\Bigr)^2

by non-negative least squares on relative errors, reweighted until the errors up and down weigh the
same. All lowerings are fitted together: many call the same operator or make the same entries.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbias.cli.problems import DIRECTIONS, FIXED, STRUCTURES, SUMS, Case, draw

if TYPE_CHECKING:
    import torch

    from attnbias.lowering import Problem

SEED = 1107
SETS = 3  # of problems: each structure, direction and format once a set, at other sizes
ROUNDS = (3, 15)  # of every line, at least and at most
NEVER = 1e4
FAR = 4.0  # a line so much slower than the fastest is not run again
Clock = Callable[[], float]
Record = dict[str, Any]


def cases() -> list[Case]:
    """The problems that are measured, set after set: stopped early, all kinds are covered."""
    source = random.Random(SEED)
    return [case for _ in range(SETS) for case in _set(source)]


def _set(source: random.Random) -> list[Case]:
    formats = ("float32", "float32", "bfloat16", "float16")
    singles = [(name,) for name in STRUCTURES]
    found = []
    for dtype in formats:
        for direction in DIRECTIONS:
            for structures in [(), *singles, *SUMS]:
                if direction == "learned" and set(structures) <= set(FIXED):
                    continue
                if dtype == "float16" and structures in SUMS:
                    continue
                found.append(draw(source, structures, direction, dtype))
    for direction in DIRECTIONS:
        for structures in [(), ("table",), ("rbf",), ("pair",), ("segments", "key"), ("grid",)]:
            if direction != "learned" or (structures and "segments" not in structures):
                found.append(draw(source, structures, direction, "float32", dropout=0.1))
    source.shuffle(found)
    return found


def seconds(
    case: Case, device: torch.device, budget: float, clock: Clock = time.perf_counter
) -> dict[str, float]:
    """Median seconds of every lowering that offers for a case; they take turns."""
    query, key, value, bias = case.build(device)
    return turns(calls(case, query, key, value, bias), device, budget, clock)


def turns(
    lines: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: float,
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of lines that take turns, after one call of each that is not counted."""
    import torch

    samples: dict[str, list[float]] = {name: [] for name in lines}

    def one(name: str) -> float:
        start = clock()
        lines[name]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    started = clock()
    for name in lines:
        one(name)  # compiles, or loads what was compiled
    names = list(lines)
    for turn in range(ROUNDS[1]):
        for name in names:
            samples[name].append(one(name))
        fastest = min(min(samples[name]) for name in names)
        names = [name for name in names if min(samples[name]) <= FAR * fastest]
        names = names[1:] + names[:1]
        if turn + 1 >= ROUNDS[0] and clock() - started > budget:
            break
    return {name: statistics.median(found) for name, found in samples.items()}


def calls(
    case: Case,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: Any,
) -> dict[str, Callable[[], object]]:
    """One call for each lowering that offers: what the direction says, dropout drawn anew."""
    import torch

    import attnbias as ab

    told = ab.explain(query, key, value, bias=bias, causal=case.causal, dropout=case.dropout)
    names = [offer.lowering for offer in told.offers if candidate(offer)]
    source = torch.Generator().manual_seed(case.seed)
    leaves = [t for t in (query, key, value) if t.requires_grad]
    if case.direction == "learned" and bias is not None:
        leaves += [p for p in bias.parameters() if p.requires_grad]
    step = torch.ones_like(query) / query.shape[-1]

    def line(name: str) -> Callable[[], object]:
        def call() -> object:
            out = ab.attention(
                query,
                key,
                value,
                bias=bias,
                causal=case.causal,
                dropout=case.dropout,
                generator=source,
                lowering=name,
            )
            if case.direction == "forward" or not leaves:
                return out
            assert isinstance(out, torch.Tensor)
            return torch.autograd.grad(out, leaves, step, allow_unused=True)

        return call

    return {name: line(name) for name in names}


def candidate(offer: Any) -> bool:
    """Whether an offer competes: the float64 oracle does not, nor what is priced never to be
    chosen (interpreted kernels, FlexAttention on a CPU).
    """
    return not offer.refused and offer.lowering != "reference" and offer.time < NEVER


# The fit -----------------------------------------------------------------------------------------


def problem_of(case: Case) -> Problem:
    """The problem of a case on the CPU, whose offers were made: columns and ranges are known."""
    import torch

    from attnbias.attention import _problem
    from attnbias.lowering import LOWERINGS

    query, key, value, bias = case.build(torch.device("cpu"))
    problem = _problem(
        query, key, value, bias, case.causal, None, None, "softmax", case.dropout, None
    )
    for lowering in LOWERINGS.values():
        lowering.answer(problem)
    return problem


def fit(records: Sequence[Record]) -> dict[str, float]:
    """The seconds of each count, from measured problems with what their lowerings did."""
    import torch

    rows = [
        (counts, record["seconds"][name])
        for record in records
        for name, counts in record["counts"].items()
        if record["seconds"].get(name)
    ]
    names = sorted({count for counts, _ in rows for count, number in counts.items() if number})
    place = {name: at for at, name in enumerate(names)}
    matrix = torch.zeros(len(rows), len(names), dtype=torch.float64)
    for at, (counts, _) in enumerate(rows):
        for count, number in counts.items():
            if number:
                matrix[at, place[count]] = number
    taken = torch.tensor([t for _, t in rows], dtype=torch.float64)
    weight = 1.0 / taken
    each = torch.zeros(len(names), dtype=torch.float64)
    for _ in range(4):
        each = nonnegative(matrix * weight[:, None], taken * weight)
        # Relative errors to the middle of both, so that a fit does not gain by being low.
        weight = 1.0 / (taken * (matrix @ each).clamp(min=1e-9)).sqrt()
    return {name: float(f"{value:.4g}") for name, value in zip(names, each.tolist(), strict=True)}


def nonnegative(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    r"""``argmin |A x - b|^2`` over ``x >= 0``: active sets, columns scaled first.

    Source: Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23.
    """
    import torch

    scale = matrix.norm(dim=0).clamp(min=1e-300)
    a = matrix / scale
    x = torch.zeros_like(scale)
    free = torch.zeros_like(scale, dtype=torch.bool)
    for _ in range(3 * len(x)):
        slope = a.mT @ (right - a @ x)
        slope[free] = -torch.inf
        best = int(slope.argmax())
        if float(slope[best]) <= 1e-9:
            break
        free[best] = True
        while True:
            step = torch.zeros_like(x)
            step[free] = torch.linalg.lstsq(a[:, free], right, driver="gelsd").solution
            low = free & (step <= 0)
            if not bool(low.any()):
                break
            # As far towards it as nothing turns negative; what reaches 0 is held there.
            share = (x[low] / (x[low] - step[low]).clamp(min=1e-300)).min()
            x = x + share * (step - x)
            free &= x > 1e-12
            x[~free] = 0.0
            if not bool(free.any()):
                break
        x = step.clamp(min=0.0)
    found: torch.Tensor = x / scale
    return found


def deviations(records: Sequence[Record], found: Mapping[str, float]) -> dict[str, float]:
    """Of each lowering, the median factor between fitted and measured time, less one."""
    gaps: dict[str, list[float]] = {}
    for record in records:
        for name, counts in record["counts"].items():
            taken = record["seconds"].get(name)
            if taken:
                told = sum(found.get(count, 0.0) * number for count, number in counts.items())
                gaps.setdefault(name, []).append(abs(math.log(max(told, 1e-9) / taken)))
    return {name: round(math.expm1(statistics.median(g)), 4) for name, g in sorted(gaps.items())}


# The files ---------------------------------------------------------------------------------------


def measured(path: Path) -> list[Record]:
    """What was measured, on any device: one record a line, in the file beside a table."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # the line that an interrupted run was writing
    return found


def tables(path: Path) -> list[dict[str, Any]]:
    """The tables of a file that is about to be written again; none where there is no file."""
    from attnbias.lowering import costs

    if not path.exists():
        return []
    costs.read(path)  # complains of what is no table
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["tables"]
    return found


def table(device: torch.device, records: Sequence[Record]) -> dict[str, Any]:
    """The table of a device, fitted to what was measured on it."""
    import torch

    import attnbias as ab
    from attnbias.lowering.costs import device_kind

    counted = [record | {"counts": counts_of(record)} for record in records]
    found = fit(counted)
    chip = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' * (count > 1)}" if device.type == "cpu" else ""
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    return {
        "device": device_kind(device),
        "measured": f"{chip}{threads}, torch {torch.__version__}, {today}",
        "versions": {"torch": torch.__version__, "attnbias": ab.__version__},
        "seed": SEED,
        "problems": len(records),
        "deviation": deviations(counted, found),
        "lowerings": ways(counted),
        "seconds": found,
    }


def ways(records: Sequence[Record]) -> dict[str, list[str]]:
    """The directions and formats in which each lowering was measured."""
    found: dict[str, set[str]] = {}
    for record in records:
        for name in record["counts"]:
            way = f"{record['case']['direction']} {record['case']['dtype']}"
            found.setdefault(name, set()).add(way)
    return {name: sorted(some) for name, some in sorted(found.items())}


def counts_of(record: Record) -> dict[str, dict[str, float]]:
    """What each measured lowering does for the problem of a record."""
    from attnbias.lowering import work

    problem = problem_of(Case.of(record["case"]))
    names = [name for name in record["seconds"] if name in work.COUNTS]
    return {name: work.counts(name, problem) for name in names}


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def write(path: Path, found: Sequence[Mapping[str, Any]]) -> None:
    """The tables of a file."""
    from attnbias.lowering.costs import VERSION

    text = json.dumps({"version": VERSION, "tables": list(found)}, indent=1, allow_nan=False)
    replace(path, text + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all: a new one beside it, then one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".costs-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(name, 0o644)
    os.replace(name, path)


def measure(
    todo: Sequence[Case],
    device: torch.device,
    minutes: float,
    clock: Clock = time.perf_counter,
) -> Iterator[Record]:
    """Records of cases, one after the other, each under its share of the time that is left."""
    from attnbias.lowering.costs import device_kind

    kind, started = device_kind(device), time.perf_counter()
    for at, case in enumerate(todo):
        left = 60.0 * minutes - (time.perf_counter() - started)
        if left <= 0:
            return
        taken = seconds(case, device, left / (len(todo) - at), clock)
        yield {
            "device": kind,
            "case": dataclasses.asdict(case),
            "seconds": {line: float(f"{value:.4g}") for line, value in taken.items()},
        }
