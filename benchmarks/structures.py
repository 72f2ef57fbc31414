"""Every structure against unbiased attention on CPU, forward and training.

    python -m benchmarks.structures [--quick] [--only N ...] [--lines WORD ...] [--fresh]

The grid was fixed before the code it measures. Batch 1, 8 heads; the floor of a cell is unbiased
attention of the same run (causal: causal attention), forward, or forward with gradients to query,
key and value; under dropout there are two, unbiased attention that drops weights (what a user
gets) and unbiased attention that drops none. Every structure runs by the planner's own choice;
rivals are lines of the same run: stock attention with the dense matrix made before, a window as
booleans, a learned table gathered to a matrix, compiled FlexAttention, and ours without compiled
loops. Every cell is published, also those that lose, do not fit, fail or are not available.

Timed: the call alone. A fixed bias is made before, a learned one inside. Lines take turns, the
floor comes three times a round; ratios of medians. The first call of each line is checked against
float64 on sampled rows: output, and all gradients under a gradient that is 0 on the other rows.
Groups are written as they finish, and a rerun continues where the code measured is the same.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks import structure_report as report
from benchmarks.attention_cpu import failure, gap, limit_memory
from benchmarks.lines import NotAvailable
from benchmarks.structure_kinds import Structure
from benchmarks.structure_lines import (
    FLOOR,
    FLOOR_AGAIN,
    FLOOR_DROPOUT,
    Line,
    lines_of,
    truth,
    unbiased,
)
from benchmarks.structure_problem import (
    BATCH,
    DIRECTIONS,
    DTYPES,
    HEADS,
    SEED,
    Answer,
    Problem,
)

MODULE = "benchmarks.structures"
LENGTHS = (512, 1024, 2048, 4096)
LONG = (8192, 16384)  # float32, heads of 64, not causal
QUICK_LENGTHS = (256,)
MEASURED: tuple[str, ...] = (
    "attnbias/bias",
    "attnbias/forms",
    "attnbias/lowering",
    "attnbias/native",
    "attnbias/attention.py",
    "benchmarks/structure_problem.py",
    "benchmarks/structure_kinds.py",
    "benchmarks/structure_lines.py",
    "benchmarks/timing.py",
)


def whole_grid(lengths: Sequence[int] = LENGTHS, long: Sequence[int] = LONG) -> list[Problem]:
    """The groups, small lengths first; those of one length next to each other."""
    found = []
    for n in lengths:
        for direction in DIRECTIONS:
            both = direction == "learn, dropout"
            found += [
                Problem(n, dim, direction=direction) for dim in (64, 32, 128)[: 1 if both else 3]
            ]
            found += [Problem(n, 64, "bfloat16", direction=direction)] * (not both)
            found += [Problem(n, 64, causal=True, direction=direction)] * (not both)
    for n in long:
        directions = DIRECTIONS[:3] if n <= 8192 else DIRECTIONS[:1]
        found += [Problem(n, direction=direction) for direction in directions]
    return found


def floors(todo: Sequence[Problem]) -> dict[tuple[int, str, bool, bool], float]:
    """Seconds of one call of the floor at 1,024 tokens, for every kind of problem to measure."""
    found = {}
    for kind in sorted({(p.dim, p.dtype, p.causal, p.backward) for p in todo}):
        dim, dtype, causal, backward = kind
        problem = Problem(1024, dim, dtype, causal, "train" if backward else "forward")
        found[kind] = common.interleave({FLOOR: unbiased(problem)}, budget=0.0)[FLOOR].low
    return found


def rounds(seconds: float, problem: Problem, budget: float) -> int:
    """How many rounds of that many seconds a group gets."""
    least = 3 if problem.length <= 2048 else 2 if problem.length <= 4096 else 1
    return common.rounds_for(seconds, budget=budget, least=least, most=12)


def group_cost(problem: Problem, floor_at_1024: float, budget: float) -> float:
    """Seconds that a group will take, roughly, from the floor's time at 1,024 tokens."""
    call = floor_at_1024 * (problem.length / 1024) ** 2
    here = [line for line in lines_of(problem) if too_large(line, problem) is None]
    one_round = call * sum(line.cost(problem) for line in here)
    compiling = 8.0 * sum("Flex" in line.name for line in here)
    warm = one_round if problem.length <= 1024 else 0.0
    # Drawing and checking: the answers of the sampled rows, a matrix of pairs.
    beside = 0.5 + 5.0 * (problem.length / 4096) + 20.0 * (problem.length / 16384) ** 2
    return one_round * rounds(one_round, problem, budget) + warm + compiling + beside


def too_large(line: Line, problem: Problem) -> dict[str, Any] | None:
    """ "does not fit" with the estimate, where the line's N x N tensors exceed free memory."""
    size = BATCH * HEADS * problem.length**2 * DTYPES[problem.dtype].itemsize
    need, free = int(line.matrices * size), int(0.85 * common.memory_bytes()[1])
    if need <= free:
        return None
    words = f"estimate {need / 1e9:.1f} GB, free {free / 1e9:.1f} GB"
    return {"status": "does not fit", "reason": words, "estimate_gb": round(need / 1e9, 2)}


def short(value: float) -> float:
    return float(f"{value:.3g}")


def errors(problem: Problem, result: dict[str, Tensor], want: Answer) -> dict[str, Any]:
    """Largest error against float64: of the output and the inputs' gradients absolute, of a
    parameter's gradient over the largest entry of the true one.
    """
    rows = problem.rows
    found: dict[str, Any] = {
        "error": short(gap(result["output"].detach()[0, :, rows], want.output))
    }
    slopes: dict[str, float] = {}
    for name, true in want.gradients.items():
        if name not in result:
            slopes[name] = 1e30  # a gradient that never came
            continue
        given = result[name].detach()
        if name in ("query", "key", "value"):
            given = given[0][:, rows] if name == "query" else given[0]
            slopes[name] = short(gap(given, true))
        else:
            if given.shape != true.shape:  # a row of it for each query
                given = given[..., rows, :]
            slopes[name] = short(gap(given, true) / max(float(true.abs().max()), 1e-30))
    if slopes:
        found["error_gradients"] = slopes
    return found


def measure(problem: Problem, *, budget: float, words: Sequence[str] = ()) -> dict[str, Any]:
    """One group: every line's time, ratio to the floor and error, or why it has none."""
    started, begin = common.now(), time.perf_counter()
    floor_names = (FLOOR, *FLOOR_AGAIN, FLOOR_DROPOUT)
    here = [
        line
        for line in lines_of(problem)
        if not words or line.name in floor_names or any(word in line.name for word in words)
    ]
    by_name = {line.name: line for line in here}
    cells: dict[str, dict[str, Any]] = {}
    calls: dict[str, Any] = {}
    for line in here:
        cell = too_large(line, problem)
        if cell is None:
            cell = {"status": "ok"}
            try:
                call = line.build(problem)
                calls[line.name] = call
                if call.lowering:
                    cell["lowering"] = call.lowering
                if line.structure is not None and line.structure.share is not None:
                    cell["share"] = short(line.structure.share(problem))
            except NotAvailable as error:
                cell = {"status": "not available", "reason": str(error)[:200]}
            except Exception as error:
                cell = failure(error)
        cells[line.name] = cell
    answers: dict[tuple[str, bool], Answer] = {}

    def known(structure: Structure | None, dropped: bool) -> Answer:
        name = (structure.name if structure else "", dropped)
        if name not in answers:
            answers[name] = truth(problem, structure, dropped=dropped)
        return answers[name]

    def inspect(name: str, result: dict[str, Tensor]) -> None:
        line = by_name[name]
        if not line.checked:
            return
        try:
            want = known(line.structure, dropped=line.structure is not None)
            cells[name] |= errors(problem, result, want)
            if line.structure is not None:
                plain = known(None, dropped=True)
                cells[name]["bias_left_out"] = short(gap(want.output, plain.output))
        except NotAvailable as error:
            cells[name]["unchecked"] = str(error)[:200]
        except Exception as error:
            cells[name]["unchecked"] = failure(error)["reason"]
        answers.pop((line.structure.name, True), None) if line.structure else None

    def on_error(name: str, error: Exception) -> None:
        lowering = cells[name].get("lowering")
        cells[name] = failure(error) | ({"lowering": lowering} if lowering else {})

    least = rounds(1e9, problem, budget)
    timings = common.interleave(
        calls,
        budget=budget,
        least=least,
        most=12,
        warmups=int(problem.length <= 1024),
        inspect=inspect,
        on_error=on_error,
    )
    floor = [sample for name in (FLOOR, *FLOOR_AGAIN) for sample in timings[name].samples]
    for name, timing in timings.items():
        cells[name] |= timing.record() | ratios(timing.samples, timings)
    return {
        "dtype": problem.dtype,
        "dim": problem.dim,
        "causal": problem.causal,
        "direction": problem.direction,
        "queries": problem.length,
        "floor_s": round(statistics.median(floor), 6),
        "fingerprint": common.fingerprint(*MEASURED),
        "lines_measured": list(words),
        **common.commit(),
        "started": started,
        "seconds": round(time.perf_counter() - begin, 1),
        "rounds": len(timings[FLOOR].samples),
        "lines": cells,
    }


def ratios(samples: Sequence[float], timings: dict[str, common.Timing]) -> dict[str, float]:
    """Medians over the floor's median of all its turns; quartiles of the ratios of single rounds
    (lowest and highest below five).
    """
    turns = [timings[name].samples for name in (FLOOR, *FLOOR_AGAIN) if name in timings]
    by_round = [statistics.median(turn) for turn in zip(*turns, strict=True)]
    floor = statistics.median([sample for turn in turns for sample in turn])
    pairs = sorted(a / b for a, b in zip(samples, by_round, strict=True))
    low, high = pairs[0], pairs[-1]
    if len(pairs) >= 5:
        low, _, high = statistics.quantiles(pairs, n=4, method="inclusive")
    middle = statistics.median(samples)
    found = {"ratio": middle / floor, "ratio_low": low, "ratio_high": high}
    if FLOOR_DROPOUT in timings:
        found["ratio_to_dropout"] = middle / timings[FLOOR_DROPOUT].median
    return {name: round(value, 4) for name, value in found.items()}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="a tiny length, written to out/ instead")
    made.add_argument("--only", type=int, nargs="+", metavar="N", help="only these lengths")
    made.add_argument("--dim", type=int, nargs="+", choices=(32, 64, 128), help="only these sizes")
    made.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), help="only these dtypes")
    made.add_argument("--mask", choices=("full", "causal"), help="only this mask")
    made.add_argument("--direction", nargs="+", choices=DIRECTIONS, help="only these directions")
    made.add_argument(
        "--lines",
        nargs="+",
        default=[],
        metavar="WORD",
        help="only lines with one "
        "of these words in their name, beside the floor; written to out/ instead",
    )
    made.add_argument("--fresh", action="store_true", help="measure again what is there already")
    made.add_argument("--threads", type=int, help="threads of torch (its own choice when left out)")
    made.add_argument("--budget", type=float, default=6.0, help="seconds of a group, roughly")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    return made


def selected(args: argparse.Namespace) -> list[Problem]:
    """The groups asked for."""
    if args.only:
        lengths = [n for n in args.only if n not in LONG]
        todo = whole_grid(lengths, [n for n in args.only if n in LONG])
    else:
        todo = whole_grid(QUICK_LENGTHS, ()) if args.quick else whole_grid()
    wanted = {
        "dim": args.dim,
        "dtype": args.dtype,
        "direction": args.direction,
        "causal": [args.mask == "causal"] if args.mask else None,
    }
    for part, values in wanted.items():
        if values:
            todo = [p for p in todo if getattr(p, part) in values]
    return todo


def target(args: argparse.Namespace, box: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Where to write, and what is there: results of another machine are never mixed or replaced."""
    name = "structures.json"
    if args.out:
        return args.out, common.load_grid(args.out)
    if args.quick or args.lines:
        return common.SCRATCH / f"{'quick' if args.quick else 'part'}_{name}", common.load_grid()
    path = common.recorded_or_scratch(name, box)
    found = common.load_grid(path)
    if found["groups"] and not common.same_box(found, box, common.versions()):
        found = common.load_grid()
    return path, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing of the grid (or of the part asked for) and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.only and min(args.only) < 64:
        print(f"--only takes lengths of 64 and more, got {min(args.only)}", file=sys.stderr)
        return 2
    path, found = target(args, common.machine(torch.get_num_threads()))
    groups, current = found["groups"], common.fingerprint(*MEASURED)
    todo = selected(args)
    if not args.fresh:
        todo = [
            p
            for p in todo
            if groups.get(p.key, {}).get("fingerprint") != current
            or groups[p.key]["lines_measured"] != args.lines
        ]
    budget = 0.02 if args.quick else args.budget
    floor = floors(todo)
    costs = [group_cost(p, floor[p.dim, p.dtype, p.causal, p.backward], budget) for p in todo]
    print(f"{len(todo)} groups to measure, about {common.duration(sum(costs))}", flush=True)
    started, begin = common.now(), time.perf_counter()
    verdict = ""
    with common.progress("structures", sum(costs)) as advance:
        for problem, cost in zip(todo, costs, strict=True):
            advance(0, problem.key)
            groups[problem.key] = {
                "run": started,
                **measure(problem, budget=budget, words=args.lines),
            }
            advance(cost, problem.key)
            head = common.header(
                MODULE,
                given,
                seeds={"inputs": SEED, "rows": SEED + 1},
                started=started,
                seconds=time.perf_counter() - begin,
                threads=torch.get_num_threads(),
            )
            whole = [p.key for p in whole_grid()]
            verdict = report.store(path, head, found["runs"], groups, whole)
    if todo:
        recorded = path.parent == common.RESULTS
        report.draw(common.load_grid(path), common.IMAGES if recorded else path.parent)
        print(f"{path}: {len(groups)} groups\n{verdict}")
    failed = [c for g in groups.values() for c in g["lines"].values() if c["status"] == "failed"]
    if failed:
        print(f"{len(failed)} cells failed; their reasons are in {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    limit_memory()  # not in main(): it holds for the whole process
    sys.exit(main())
