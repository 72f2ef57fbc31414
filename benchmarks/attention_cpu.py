"""Biased attention against unbiased attention on CPU: THE grid of this project.

    python -m benchmarks.attention_cpu [--quick] [--only N ...] [--dtype NAME ...] [--fresh]

The grid was fixed before the code it measures: N 512 to 16,384 by doubling, batch 1, 8 heads of
dimension 64, float32 and bfloat16, causal (over causal attention) and not (over plain attention),
forward and forward with gradients to query, key and value; the bias is fixed. Every cell is
published, also the ones that lose, do not fit or are not available.

Timed: the call alone. Bias objects, dense masks and compiled kernels exist before; whatever ours
does inside a call (flips, tiles, blocks) is inside the time. The dense mask is in the dtype of the
query, as users pass it. Lines take turns; medians; the ratio is over the median of the floor.
Groups are written as they finish, and a rerun continues where the code measured is the same.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import attention_report as report
from benchmarks import common, lines
from benchmarks.lines import FLOOR, Line, lines_of, mask_name, plain
from benchmarks.problem import DTYPES, SEED, Problem

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
QUICK_LENGTHS = (128,)
WARM_AT_MOST = 4096  # beyond, what a first call does once is nothing beside the call itself
MODULE = "benchmarks.attention_cpu"
# What decides whether a group measured before still counts: the code that is timed, and the lines.
MEASURED: tuple[str, ...] = (
    "attnbias/bias",
    "attnbias/forms",
    "attnbias/lowering",
    "attnbias/attention.py",
)
MEASURED += ("benchmarks/problem.py", "benchmarks/lines.py", "benchmarks/timing.py")


def key_of(problem: Problem) -> str:
    causal = "causal" if problem.causal else "full"
    direction = "forward+backward" if problem.backward else "forward"
    return f"{problem.dtype}/{causal}/{direction}/{problem.length}"


def problems(lengths: Sequence[int], dtypes: Sequence[str]) -> list[Problem]:
    """The groups of the grid, small lengths first; directions next to each other share a mask."""
    return [
        Problem(length, dtype, causal, backward)
        for length in lengths
        for dtype in dtypes
        for causal in (False, True)
        for backward in (False, True)
    ]


def floors(todo: Sequence[Problem]) -> dict[tuple[str, bool, bool], float]:
    """Seconds of one call of the floor at 1,024 tokens, for every kind of problem to measure."""
    found = {}
    for kind in sorted({(p.dtype, p.causal, p.backward) for p in todo}):
        problem = Problem(1024, *kind)
        call = lines.timed(problem, plain(problem, {}))
        found[kind] = common.interleave({FLOOR: call}, budget=0.0)[FLOOR].low
    return found


def group_cost(problem: Problem, floor_at_1024: float, budget: float) -> float:
    """Seconds that a group will take, roughly, from the floor's time at 1,024 tokens."""
    here = [
        line for line in lines_of(problem) if not line.matrices[0] or not too_large(line, problem)
    ]
    call = floor_at_1024 * (problem.length / 1024) ** 2
    one_round = call * sum(line.cost(problem) for line in here)
    rounds = common.rounds_for(one_round, budget=budget) + (problem.length <= WARM_AT_MOST)
    compiling = 0.0 if problem.backward else 4.0 + call
    return one_round * rounds + compiling + 4.0 * (problem.length / 16384) ** 2


def too_large(
    line: Line, problem: Problem, shared: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    """ "does not fit" with the estimate, where the line's N x N tensors exceed free memory."""
    need = lines.dense_bytes(problem, line.matrices[problem.backward])
    held = shared["mask"].nbytes if shared and "mask" in shared else 0  # counted in `need` already
    free = int(0.92 * common.memory_bytes()[1]) + held
    if need <= free:
        return None
    estimate = f"estimate {need / 1e9:.1f} GB, free {free / 1e9:.1f} GB"
    return {"status": "does not fit", "reason": estimate, "estimate_gb": round(need / 1e9, 2)}


def measure(problem: Problem, shared: dict[str, Any], *, budget: float) -> dict[str, Any]:
    """One group: every line's time, ratio to the floor and error, or why it has none."""
    started, begin = common.now(), time.perf_counter()
    cells: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    here = lines_of(problem)
    by_name = {line.name: line for line in here}
    kinds = sorted({line.kind for line in here})
    answers = {kind: problem.answer(kind) for kind in kinds}
    if shared.get("mask_of") != mask_name(problem):
        shared.clear()  # the mask of other groups must not take what this one needs
    for line in here:
        cell = too_large(line, problem, shared) if line.matrices[0] else None
        shared.pop("lowering", None)
        if cell is None:
            cell = {"status": "ok"}
            try:
                calls[line.name] = lines.timed(problem, line.build(problem, shared))
            except lines.NotAvailable as error:
                cell = {"status": "not available", "reason": str(error)}
            except Exception as error:
                cell = failure(error)
            if shared.get("lowering"):
                cell["lowering"] = shared["lowering"]
        cells[line.name] = cell

    def inspect(name: str, result: Any) -> None:
        cells[name] |= errors(problem, result, answers[by_name[name].kind])

    timings = common.interleave(
        calls,
        budget=budget,
        warmups=int(problem.length <= WARM_AT_MOST),
        inspect=inspect,
        on_error=lambda name, error: cells[name].update(failure(error)),
    )
    for name, timing in timings.items():
        cells[name] |= timing.record() | rounded(timing.over(timings[FLOOR]))
    return {
        "dtype": problem.dtype,
        "causal": problem.causal,
        "backward": problem.backward,
        "queries": problem.length,
        "fingerprint": common.fingerprint(*MEASURED),
        **common.commit(),
        "started": started,
        "seconds": round(time.perf_counter() - begin, 1),
        "rounds": len(timings[FLOOR].samples),
        "bias_effect": {
            kind: float(f"{gap(answers[kind][0], answers['none'][0]):.3g}") for kind in kinds
        },
        "lines": cells,
    }


def failure(error: Exception) -> dict[str, Any]:
    words = str(error).strip().splitlines() or [""]
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return {"status": "does not fit", "reason": f"while running: {words[0][:200]}"}
    return {"status": "failed", "reason": f"{type(error).__name__}: {words[0][:200]}"}


def rounded(ratios: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in ratios.items()}


def gap(one: Tensor, other: Tensor) -> float:
    """The largest absolute difference; a NaN counts as infinite."""
    largest = (one.double() - other.double()).abs().nan_to_num(nan=torch.inf).max()
    return min(float(largest), 1e30)


def errors(problem: Problem, result: Any, answer: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Largest error against float64 on the sampled rows: of the output, of the query's gradient."""
    output, slope = (result[0], result[1]) if problem.backward else (result, None)
    found = {"error": float(f"{gap(output.detach()[0, :, problem.rows], answer[0]):.3g}")}
    if slope is not None:
        found["error_grad_query"] = float(f"{gap(slope[0, :, problem.rows], answer[1]):.3g}")
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="tiny lengths, written to out/ instead")
    made.add_argument("--only", type=int, nargs="+", metavar="N", help="only these lengths")
    made.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), help="only these dtypes")
    made.add_argument("--mask", choices=("full", "causal"), help="only this mask")
    made.add_argument("--direction", choices=("forward", "forward+backward"), help="only this")
    made.add_argument("--fresh", action="store_true", help="measure again what is there already")
    made.add_argument("--threads", type=int, help="threads of torch (its own choice when left out)")
    made.add_argument("--budget", type=float, default=15.0, help="seconds of a group, roughly")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    return made


def limit_memory() -> None:
    """Let an allocation beyond what is free fail here, instead of the system ending the process."""
    with contextlib.suppress(OSError, ValueError, ImportError):
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + common.memory_bytes()[1]
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))


def target(args: argparse.Namespace, box: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Where to write, and what is there: results of another machine are never mixed or replaced."""
    name = "attention_cpu.json"
    if args.out or args.quick:
        path = args.out or common.SCRATCH / f"quick_{name}"
        return path, common.load_grid(None if args.quick else path)
    path = common.recorded_or_scratch(name, box)
    found = common.load_grid(path)
    if found["groups"] and not common.same_box(found, box, common.versions()):
        found = {"groups": {}, "runs": []}  # what lies in out/ is nobody's record
    return path, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing of the grid (or of the part asked for) and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    if args.threads:
        torch.set_num_threads(args.threads)
    lengths = args.only or (QUICK_LENGTHS if args.quick else LENGTHS)
    if min(lengths) < 2:
        print(f"--only takes lengths of 2 and more, got {min(lengths)}", file=sys.stderr)
        return 2
    path, found = target(args, common.machine(torch.get_num_threads()))
    groups, current = found["groups"], common.fingerprint(*MEASURED)
    todo = problems(lengths, args.dtype or list(DTYPES))
    if args.mask:
        todo = [p for p in todo if p.causal == (args.mask == "causal")]
    if args.direction:
        todo = [p for p in todo if p.backward == (args.direction != "forward")]
    if not args.fresh:
        todo = [p for p in todo if groups.get(key_of(p), {}).get("fingerprint") != current]
    budget = 0.02 if args.quick else args.budget
    floor = floors(todo)
    costs = [group_cost(p, floor[p.dtype, p.causal, p.backward], budget) for p in todo]
    print(f"{len(todo)} groups to measure, about {common.duration(sum(costs))}", flush=True)
    whole = [key_of(p) for p in problems(LENGTHS, list(DTYPES))]
    seeds = {"inputs": SEED, "rows": SEED + 1}
    started, begin = common.now(), time.perf_counter()
    shared: dict[str, Any] = {}
    with common.progress("attention_cpu", sum(costs)) as advance:
        for problem, cost in zip(todo, costs, strict=True):
            name = key_of(problem)
            advance(0, name)
            groups[name] = {"run": started, **measure(problem, shared, budget=budget)}
            advance(cost, name)
            head = common.header(
                MODULE,
                given,
                seeds=seeds,
                started=started,
                seconds=time.perf_counter() - begin,
                threads=torch.get_num_threads(),
            )
            goals = report.store(path, head, found["runs"], groups, whole)
    if todo:
        recorded = path.parent == common.RESULTS
        report.draw(
            common.load_grid(path),
            (common.IMAGES if recorded else path.parent) / f"{path.stem}.png",
        )
        print(f"{path}: {len(groups)} groups; goals: {goals}")
    failed = [c for g in groups.values() for c in g["lines"].values() if c["status"] == "failed"]
    if failed:
        print(f"{len(failed)} cells failed; their reasons are in {path}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    limit_memory()  # not in main(): it holds for the whole process
    sys.exit(main())
