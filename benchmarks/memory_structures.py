"""Peak memory of every structure over unbiased attention, one fresh process for each line.

    python -m benchmarks.memory_structures [--quick] [--only N ...] [--lines WORD ...]

8 heads of dimension 64, float32; forward at 8,192 and 16,384 tokens, training with learned
parameters at 4,096 and 8,192. Every process first runs its line on a short problem, so that what a
program loads once is not counted; a number is the rise of the peak resident size from there, less
the rise of the process that does the same with unbiased attention. Goal: beyond the parameters and
their gradients nothing of the size of N x N, so less than one such matrix of one head (268 MB at
8,192 tokens).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.memory import reset_peak

MODULE = "benchmarks.memory_structures"
FLOOR = "unbiased"
LENGTHS = {"forward": (8192, 16384), "learn": (4096, 8192)}
QUICK_LENGTHS = {"forward": (512,), "learn": (512,)}


def names(direction: str) -> list[str]:
    """The lines of a direction, the floor first."""
    from benchmarks.structure_kinds import STRUCTURES

    return [FLOOR, *(s.name for s in STRUCTURES if s.learn or direction == "forward")]


def child(line: str, length: int, direction: str) -> dict[str, Any]:
    """One call in this process, and the rise of the peak of its resident size in bytes."""
    import torch

    from benchmarks.structure_lines import lines_of
    from benchmarks.structure_problem import Problem

    def call(size: int) -> Any:
        problem = Problem(size, direction=direction)
        problem.inputs, problem.grad_output, problem.sparse_grad  # noqa: B018 - made before
        found = next(entry for entry in lines_of(problem) if entry.name == line)
        return found.build(problem)

    call(256)()
    reset_peak()
    before = common.peak_bytes()["peak"]
    made = call(length)
    own = sum(p.nbytes * (1 + p.requires_grad) for p in made.parameters.values())
    start = time.perf_counter()
    result = made()
    seconds = time.perf_counter() - start
    peak = common.peak_bytes()["peak"]
    return {
        "peak": peak,
        "before": before,
        "rise": peak - before,
        "own": own,
        "seconds": round(seconds, 3),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in result.values()),
        "lowering": made.lowering,
        "threads": torch.get_num_threads(),
    }


def cost(length: int, direction: str) -> float:
    """Seconds of one process, roughly, for the estimate alone."""
    return 5.0 + (1.2 if direction == "forward" else 7.0) * (length / 8192) ** 2


def measure(length: int, direction: str, wanted: Sequence[str], advance: Any) -> dict[str, Any]:
    """Every line at one length."""
    rows: dict[str, dict[str, Any]] = {}
    for line in wanted:
        words = f"{direction}, {length:,} tokens, {line}"
        advance(0, words)
        try:
            found = common.fresh(MODULE, ["--child", line, str(length), direction])
            rows[line] = {"status": "ok", **found}
        except common.ChildFailed as error:
            rows[line] = {"status": "failed", "reason": str(error)[:200]}
        advance(cost(length, direction), words)
    floor = rows[FLOOR]
    for line, row in rows.items():
        if line != FLOOR and row["status"] == "ok" and floor["status"] == "ok":
            row["extra_mb"] = round((row["rise"] - floor["rise"]) / 1e6, 1)
            row["beyond_parameters_mb"] = round((row["rise"] - floor["rise"] - row["own"]) / 1e6, 1)
    return {"direction": direction, "queries": length, "lines": rows}


def goals(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether each line stays under one N x N matrix of one head."""
    return [
        {
            "line": line,
            "direction": group["direction"],
            "queries": group["queries"],
            "limit_mb": round(4 * group["queries"] ** 2 / 1e6, 1),
            "beyond_parameters_mb": row.get("beyond_parameters_mb"),
            "holds": row.get("beyond_parameters_mb", 1e9) < 4 * group["queries"] ** 2 / 1e6,
        }
        for group in groups
        for line, row in group["lines"].items()
        if line != FLOOR
    ]


def markdown(payload: dict[str, Any]) -> str:
    """The report: every line at every length, then the goal."""
    groups = payload["groups"]
    columns = [f"{g['direction']}, N = {g['queries']:,}" for g in groups]
    lines = list(dict.fromkeys(line for g in groups for line in g["lines"] if line != FLOOR))

    def cell(group: dict[str, Any], line: str) -> str:
        row = group["lines"].get(line)
        if row is None:
            return ""
        if "extra_mb" not in row:
            return str(row.get("reason", "the floor failed"))
        way = f" `{row['lowering']}`" if row["lowering"] else ""
        return f"{row['extra_mb']:.0f} ({row['beyond_parameters_mb']:.0f}){way}"

    rows = [[line, *(cell(group, line) for group in groups)] for line in lines]
    short = [found for found in payload["goals"] if not found["holds"]]
    verdict = f"{len(payload['goals']) - len(short)} of {len(payload['goals'])} cells hold"
    parts = [
        "# Peak memory of every structure over unbiased attention on CPU",
        common.header_markdown(payload),
        "8 heads of dimension 64, float32; one fresh process a number. MB (10^6 bytes) of peak "
        "resident size beyond the process that does the same with unbiased attention, counted from "
        "after a short problem; in brackets without the parameters and their gradients.",
        common.markdown_table(["line", *columns], rows),
        "Goal: beyond parameters and their gradients less than one N x N matrix of one head in "
        "float32 (67 MB at 4,096 tokens, 268 MB at 8,192, 1,074 MB at 16,384): " + verdict + ".",
        "\n".join(
            f"- FALLS SHORT: {v['line']}, {v['direction']}, {v['queries']:,}: "
            f"{v['beyond_parameters_mb']} MB"
            for v in short
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; `--child` is one measured process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--quick", action="store_true", help="a tiny length, written to out/ instead")
    made.add_argument("--only", type=int, nargs="+", metavar="N", help="only these lengths")
    made.add_argument("--lines", nargs="+", metavar="WORD", help="only lines with such a word")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    made.add_argument(
        "--child", nargs=3, metavar=("LINE", "N", "DIRECTION"), help=argparse.SUPPRESS
    )
    args = made.parse_args(given)
    if args.child:
        line, length, direction = args.child
        print(json.dumps(child(line, int(length), direction)))
        return 0
    lengths = QUICK_LENGTHS if args.quick else LENGTHS
    todo = [
        (n, direction)
        for direction, every in lengths.items()
        for n in every
        if not args.only or n in args.only
    ]
    if not todo:
        print(f"--only takes lengths of {LENGTHS}, got {args.only}", file=sys.stderr)
        return 2
    wanted = {
        direction: [
            line
            for line in names(direction)
            if line == FLOOR or not args.lines or any(word in line for word in args.lines)
        ]
        for direction in lengths
    }
    path = args.out or common.SCRATCH / "quick_memory_structures.json"
    if not (args.out or args.quick or args.only or args.lines):
        path = common.recorded_or_scratch("memory_structures.json", common.machine())
    total = sum(cost(n, direction) * len(wanted[direction]) for n, direction in todo)
    count = sum(len(wanted[direction]) for _, direction in todo)
    print(f"{count} processes, about {common.duration(total)}", flush=True)
    started, begin = common.now(), time.perf_counter()
    with common.progress("memory_structures", total) as advance:
        groups = [measure(n, direction, wanted[direction], advance) for n, direction in todo]
    threads = [r["threads"] for g in groups for r in g["lines"].values() if "threads" in r]
    head = common.header(
        MODULE,
        given,
        seeds={},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=threads[0] if threads else None,
    )
    payload = {**head, "goals": goals(groups), "groups": groups}
    common.write_result(path, payload, markdown(payload))
    print(markdown(payload))
    failed = any(row["status"] != "ok" for group in groups for row in group["lines"].values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
