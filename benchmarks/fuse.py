"""Real models fused, beside stock at its best attention and beside their bias removed.

    python -m benchmarks.fuse [--quick] [--only NAME ...] [--kind KIND ...] [--fresh] [--minutes M]

Models, sizes and goals were fixed before the code (`benchmarks/fuse_grid.py`). Every model is the
real class with random weights and tables from N(0, 1), float32, batch 1. Three lines take turns in
one process, on three copies that share their weights: the stock model at its fastest attention (of
``eager``, ``sdpa``, or its chunk sizes, by a trial of each), ``ab.fuse(model)``, and the model
with its bias left out, through PyTorch's fused kernel. Memory is the peak resident size of a fresh
process of each line.

A model has a process of its own: one that fails, does not end or does not fit is published as such
and stops nothing. The run says first how long it will take, ends within `--minutes`, writes each
cell when it is done, and a rerun goes on with what is missing or whose code has changed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.fuse_grid import BARE, FUSED, GRID, LINES, QUICK, STOCK, Cell, fingerprint
from benchmarks.fuse_report import markdown, payload

MODULE = "benchmarks.fuse"
KINDS = ("forward", "training", "token", "memory")
START = 6.0  # seconds until a process has loaded everything
REFERENCE = 0.0127  # seconds of unbiased attention, 8 heads of 64, 1,024 tokens, two idle cores


def speed() -> float:
    """How much slower than the reference this machine is now."""
    import torch

    query = torch.randn(1, 8, 1024, 64)
    attend = torch.nn.functional.scaled_dot_product_attention
    calls = {"": lambda: attend(query, query, query)}
    taken = common.interleave(calls, budget=0.5, most=40)[""].median
    return max(taken / REFERENCE, 0.2)


def cost(cell: Cell, budget: float, slower: float = 1.0) -> float:
    """Seconds that a cell will take, roughly."""
    from benchmarks.fuse_measure import LARGE, least_rounds

    seconds = cell.seconds * slower
    if cell.memory:
        return seconds + START * len(LINES)
    least = 1 if budget < 1 else least_rounds(cell.seconds)
    rounds = common.rounds_for(seconds, budget=budget, least=least, most=25)
    trials = 1.2 * seconds if cell.seconds < LARGE else 0.0  # of the stock ways
    warm = seconds if cell.seconds < LARGE else 0.1 * seconds
    return seconds * rounds + trials + warm + 1.0


def quick_grid() -> tuple[Cell, ...]:
    """One small cell of each kind of each subject."""
    units = {"Swin": "pixels", "Swin v2": "pixels", "BEiT": "pixels", "ESMFold": "residues",
             "Pairformer": "residues"}  # fmt: skip
    kinds = dict.fromkeys((cell.subject, cell.kind) for cell in GRID)
    return tuple(Cell(name, kind, QUICK[units.get(name, "tokens")], 0.5) for name, kind in kinds)


# The process of one model ------------------------------------------------------------------------


def child(subject: str, cells: Sequence[Cell], budget: float) -> int:
    """Measure cells of one subject, smallest first; one line of JSON for each."""
    from benchmarks.attention_cpu import limit_memory
    from benchmarks.fuse_measure import guarded, timed

    limit_memory()
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is not a result
    for cell in cells:
        found = guarded(cell, lambda cell=cell: timed(cell, budget))  # type: ignore[misc]
        print(json.dumps({"key": cell.key, "group": found}), file=out, flush=True)
    return 0


def run_child(
    cells: Sequence[Cell], budget: float, limit: float, threads: int | None
) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Each cell as the process of its subject reports it; those it never reports have a reason."""
    names = ",".join(f"{cell.kind}:{cell.size}:{cell.seconds}" for cell in cells)
    command = [sys.executable, "-m", MODULE, "--child", cells[0].subject, names]
    environment = dict(os.environ, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    process = subprocess.Popen(
        [*command, "--budget", str(budget)], cwd=common.ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    waiting = {cell.key: cell for cell in cells}
    watch = _watch(process, limit)
    try:
        for line in process.stdout:
            with contextlib.suppress(json.JSONDecodeError, KeyError):
                said = json.loads(line)
                yield waiting.pop(said["key"]), said["group"]
        code = process.wait()
    finally:
        process.kill()
        process.stdout.close()
        watch()
    for cell in waiting.values():
        reason = f"the process ended with code {code}"
        if code == -9:
            reason += f" (out of memory, or longer than {common.duration(limit)})"
        yield cell, failed(cell, reason)


def _watch(process: subprocess.Popen[str], limit: float) -> Callable[[], None]:
    """End a process that takes too long; returns what ends the watching."""
    import threading

    timer = threading.Timer(limit, process.kill)
    timer.daemon = True
    timer.start()
    return timer.cancel


def failed(cell: Cell, reason: str) -> dict[str, Any]:
    """The group of a cell that could not be measured."""
    from benchmarks.fuse_models import SUBJECTS

    return {
        "subject": cell.subject,
        "kind": cell.kind,
        "size": cell.size,
        "unit": SUBJECTS[cell.subject].unit if cell.subject in SUBJECTS else "",
        "status": "failed",
        "reason": reason[:300],
        "started": common.now(),
        "fingerprint": fingerprint(cell.subject),
    }


# Memory ------------------------------------------------------------------------------------------


def _nearest(cell: Cell, groups: dict[str, Any]) -> dict[str, Any]:
    """The timed cell of the same model and kind that is nearest in size."""
    kind = cell.kind.split()[-1]
    same = [g for g in groups.values() if (g["subject"], g["kind"]) == (cell.subject, kind)]
    found: dict[str, Any] = min(same, key=lambda g: abs(g["size"] - cell.size), default={})
    return found


def memory(cell: Cell, groups: dict[str, Any], threads: int | None) -> dict[str, Any]:
    """One fresh process for each line; the stock way is the one that was fastest by time."""
    from benchmarks.fuse_measure import compared, guarded
    from benchmarks.fuse_models import SUBJECTS

    def measure() -> dict[str, Any]:
        timed = _nearest(cell, groups)
        if timed.get("status") == "missing":
            return {"status": "missing", "reason": timed["reason"]}
        lines = timed.get("lines", {})
        variant = lines.get(STOCK, {}).get("variant", SUBJECTS[cell.subject].variants[0].name)
        rows: dict[str, dict[str, Any]] = {}
        for line in (FUSED, BARE, STOCK):
            given = ["--child", cell.subject, f"{cell.kind}:{cell.size}:{cell.seconds}"]
            try:
                rows[line] = common.fresh(
                    MODULE, [*given, "--line", line, "--variant", variant], threads=threads
                )
            except common.ChildFailed as error:
                status = "does not fit" if "code -9" in str(error) else "failed"
                rows[line] = {"status": status, "reason": str(error)[:300]}
        return {
            "status": "ok",
            "ratios": compared(cell, rows),
            "lines": {line: rows[line] for line in LINES},
        }

    return guarded(cell, measure)


# The run -----------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="one tiny size, written to out/ instead")
    made.add_argument("--only", nargs="+", metavar="NAME", help="only models with such a word")
    made.add_argument("--kind", nargs="+", choices=KINDS, help="only these kinds of cells")
    made.add_argument("--size", type=int, nargs="+", metavar="N", help="only these sizes")
    made.add_argument("--fresh", action="store_true", help="measure again what is there already")
    made.add_argument("--minutes", type=float, default=32.0, help="end within so many minutes")
    made.add_argument("--budget", type=float, default=3.0, help="seconds of a small cell, roughly")
    made.add_argument("--threads", type=int, help="threads of torch (its own choice when left out)")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    for name in ("--line", "--variant"):
        made.add_argument(name, help=argparse.SUPPRESS)
    made.add_argument("--child", nargs=2, metavar=("MODEL", "CELLS"), help=argparse.SUPPRESS)
    return made


def selected(args: argparse.Namespace) -> list[Cell]:
    """The cells asked for."""

    def wanted(cell: Cell) -> bool:
        words = [word.lower() for word in args.only or ()]
        return (
            (not words or any(word in cell.subject.lower() for word in words))
            and (not args.kind or ("memory" if cell.memory else cell.kind) in args.kind)
            and (not args.size or cell.size in args.size)
        )

    return [cell for cell in (quick_grid() if args.quick else GRID) if wanted(cell)]


def target(args: argparse.Namespace, box: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Where to write, and what is there: results of another machine are never mixed or replaced."""
    if args.out or args.quick:
        path = args.out or common.SCRATCH / "quick_fuse.json"
        return path, common.load_grid(path if args.out else None)
    path = common.recorded_or_scratch("fuse.json", box)
    found = common.load_grid(path)
    if found["groups"] and not common.same_box(found, box, common.versions()):
        found = common.load_grid()
    return path, found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing of the grid (or of the part asked for) and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    if args.child:
        return _child(args)
    todo = selected(args)
    if not todo:
        print("no cell of the grid has such a name, kind and size", file=sys.stderr)
        return 2
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    box = common.machine(torch.get_num_threads())
    path, found = target(args, box)
    groups = found["groups"]
    if not args.fresh:
        todo = [c for c in todo if _stale(groups.get(c.key), c)]
    budget = 0.3 if args.quick else args.budget
    slower = 1.0 if args.quick else speed()
    costs = {cell.key: cost(cell, budget, slower) for cell in todo}
    starts = START * len({cell.subject for cell in todo if not cell.memory})
    total = sum(costs.values()) + starts
    print(
        f"{len(todo)} cells, about {common.duration(total)} (this machine takes {slower:.2f} times "
        f"the reference's time); the run ends within {args.minutes:g} minutes",
        flush=True,
    )
    started, begin = common.now(), time.perf_counter()

    def left() -> float:
        return 60 * args.minutes - (time.perf_counter() - begin)

    def store(cell: Cell, group: dict[str, Any]) -> None:
        groups[cell.key] = {"run": started, **group}
        head = common.header(
            MODULE, given, seeds={"torch": 0}, started=started,
            seconds=time.perf_counter() - begin, threads=torch.get_num_threads(),
        )  # fmt: skip
        whole = [one.key for one in (quick_grid() if args.quick else GRID)]
        result = payload(
            common.grid(head, found["runs"], groups, whole), quick_grid() if args.quick else GRID
        )
        common.write_result(path, result, markdown(result))

    skipped: list[Cell] = []
    with common.progress("fuse", total) as advance:
        for _, part in groupby(todo, key=lambda one: (one.subject, one.memory)):
            cells = []
            room = left()
            for cell in part:
                if costs[cell.key] > room:
                    skipped.append(cell)
                    continue
                cells.append(cell)
                room -= costs[cell.key]
            if not cells:
                continue
            advance(0, cells[0].key)
            if cells[0].memory:
                for cell in cells:
                    store(cell, memory(cell, groups, args.threads))
                    advance(costs[cell.key], cell.key)
                continue
            limit = min(120 + 6 * sum(costs[cell.key] for cell in cells), max(left(), 0) + 120)
            for cell, group in run_child(cells, budget, limit, args.threads):
                store(cell, group)
                advance(costs[cell.key], cell.key)
    if path.with_suffix(".md").is_file():
        print(path.with_suffix(".md").read_text(encoding="utf-8"))
    if skipped:
        names = ", ".join(cell.key for cell in skipped)
        print(f"no time for {names}: call it again, it goes on there", file=sys.stderr)
    bad = [c.key for c in todo if groups.get(c.key, {}).get("status") == "failed"]
    if bad:
        print(f"failed: {', '.join(bad)}; the reasons are in {path}", file=sys.stderr)
    return 1 if bad or skipped else 0


def _child(args: argparse.Namespace) -> int:
    subject, names = args.child
    cells = []
    for one in names.split(","):
        kind, size, seconds = one.split(":")
        cells.append(Cell(subject, kind, int(size), float(seconds)))
    if args.line is None:
        return child(subject, cells, args.budget)
    from benchmarks.fuse_measure import peak

    print(json.dumps(peak(cells[0], args.line, args.variant)))
    return 0


def _stale(group: dict[str, Any] | None, cell: Cell) -> bool:
    """Whether a cell must be measured: never was, failed, or its code is another now."""
    if group is None or group["status"] != "ok":
        return True
    return bool(group["fingerprint"] != fingerprint(cell.subject))


if __name__ == "__main__":
    sys.exit(main())
