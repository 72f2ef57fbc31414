"""Peak memory of biased over unbiased attention, one fresh process for each line.

    python -m benchmarks.memory_cpu [--quick] [--only N ...]

8 heads of dimension 64, float32, forward. A line's number is the worst peak of its processes minus
the least peak of the processes that do the same with unbiased attention (causal over causal): the
unkind way round. Goal, fixed before the code: under 100 MB (10^6 bytes) at 32,768 tokens. Every
process loads the compiled loops, if they are installed, before it starts: about 130 MB, once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common

LENGTHS = (8192, 16384, 32768)
QUICK_LENGTHS = (256,)
GOAL_MB, GOAL_AT = 100.0, 32768
MODULE = "benchmarks.memory_cpu"


@dataclass(frozen=True)
class MemoryLine:
    """A line of the comparison; `line` is its name in the attention grid."""

    name: str
    line: str
    causal: bool

    @property
    def floor(self) -> str:
        """The unbiased line it stands against."""
        return "unbiased, causal" if self.causal else "unbiased"


LINES = (
    MemoryLine("unbiased", "plain", False),
    MemoryLine("unbiased, causal", "plain", True),
    MemoryLine("key bias", "key bias", False),
    MemoryLine("relative", "T5 table", False),
    MemoryLine("key bias, causal", "key bias", True),
    MemoryLine("relative, causal", "T5 table", True),
    MemoryLine("relative, tiled", "ALiBi, tiled", False),
)


def child(line: str, length: int, causal: bool) -> dict[str, Any]:
    """One forward in this process, and the peak of its resident size in bytes."""
    import torch

    from attnbias import KeyBias, attention, native
    from benchmarks import lines
    from benchmarks.problem import DIM, Problem

    # Every process warms up alike, so that buffers made once are in the floor as well.
    build = next(entry.build for entry in lines.LINES if entry.name == line)
    small = Problem(min(DIM, length), causal=causal)
    lines.timed(small, build(small, {}))()
    if native.available():
        q = torch.zeros(1, 1, 64, 16)
        attention(q, q, q, bias=KeyBias(torch.zeros(64)), lowering="own")
    before = common.peak_bytes()["peak"]
    problem, shared = Problem(length, causal=causal), dict[str, Any]()
    call = lines.timed(problem, build(problem, shared))
    start = time.perf_counter()
    output = call()
    seconds = time.perf_counter() - start
    return {
        **common.peak_bytes(),
        "before": before,
        "seconds": round(seconds, 3),
        "finite": bool(torch.isfinite(output).all()),
        "lowering": shared.get("lowering"),
        "threads": torch.get_num_threads(),
    }


def extra_megabytes(peaks: dict[str, list[dict[str, Any]]], line: MemoryLine) -> float:
    """The worst peak of a line over the least of its floor, in MB."""
    worst: int = max(sample["peak"] for sample in peaks[line.name])
    least: int = min(sample["peak"] for sample in peaks[line.floor])
    return round((worst - least) / 1e6, 1)


def measure(length: int, repeats: int, advance: Any) -> dict[str, Any]:
    """Every line at one length; the lines take turns."""
    peaks: dict[str, list[dict[str, Any]]] = {line.name: [] for line in LINES}
    failed: dict[str, str] = {}
    for _ in range(repeats):
        for line in LINES:
            advance(0, f"{length:,} tokens, {line.name}")
            task = [line.line, str(length), str(int(line.causal))]
            try:
                peaks[line.name].append(common.fresh(MODULE, ["--child", *task]))
            except common.ChildFailed as error:
                failed[line.name] = str(error)
            advance(cost(length, line.causal), f"{length:,} tokens, {line.name}")
    rows = {}
    for line in LINES:
        row: dict[str, Any] = {"samples": peaks[line.name], "floor": line.floor}
        if line.name in failed or line.floor in failed:
            row |= {"status": "failed", "reason": failed.get(line.name) or failed[line.floor]}
        else:
            least = min(sample["peak"] for sample in peaks[line.name])
            row |= {"status": "ok", "peak_mb": round(least / 1e6, 1)}
            row["lowering"] = peaks[line.name][0]["lowering"]
            row["extra_mb"] = extra_megabytes(peaks, line)
        rows[line.name] = row
    return {"queries": length, "lines": rows}


def cost(length: int, causal: bool) -> float:
    """Seconds of one process, roughly, for the estimate alone."""
    return 4.0 + 1.3 * (0.5 if causal else 1.0) * 16.0 * (length / 32768) ** 2


def goal(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether each biased line stays under the goal at the length it was set for."""
    return [
        {
            "line": name,
            "queries": group["queries"],
            "limit_mb": GOAL_MB,
            "extra_mb": row.get("extra_mb"),
            "holds": row["status"] == "ok" and row["extra_mb"] < GOAL_MB,
        }
        for group in groups
        if group["queries"] == GOAL_AT
        for name, row in group["lines"].items()
        if name != row["floor"]
    ]


def markdown(payload: dict[str, Any]) -> str:
    """The report: every line at every length, then the goal."""
    rows = []
    for group in payload["groups"]:
        for name, row in group["lines"].items():
            if row["status"] != "ok":
                rows.append([name, f"{group['queries']:,}", row["reason"], "", ""])
                continue
            extra = "" if name == row["floor"] else f"{row['extra_mb']:.1f}"
            cells = [f"{row['peak_mb']:.1f}", extra, row["lowering"] or ""]
            rows.append([name, f"{group['queries']:,}", *cells])
    verdicts = [
        f"- {found['line']}: {found['extra_mb']} MB, "
        + ("holds" if found["holds"] else "FALLS SHORT")
        for found in payload["goals"]
    ]
    parts = [
        "# Peak memory of biased over unbiased attention on CPU",
        common.header_markdown(payload),
        "8 heads of dimension 64, float32, forward; each number from fresh processes. Extra: worst "
        "peak of the line minus least peak of the same process with unbiased attention.",
        common.markdown_table(["line", "N", "peak MB", "extra MB", "ran as"], rows),
        f"Goal: under {GOAL_MB:.0f} MB at {GOAL_AT:,} tokens.",
        "\n".join(verdicts) or "Not measured at that length.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; `--child` is one measured process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--quick", action="store_true", help="a tiny length, written to out/ instead")
    made.add_argument("--only", type=int, nargs="+", metavar="N", help="only these lengths")
    made.add_argument("--repeats", type=int, default=2, help="processes for each line and length")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    made.add_argument("--child", nargs=3, metavar=("LINE", "N", "CAUSAL"), help=argparse.SUPPRESS)
    args = made.parse_args(given)
    if args.child:
        line, length, causal = args.child
        print(json.dumps(child(line, int(length), causal == "1")))
        return 0
    lengths = args.only or (QUICK_LENGTHS if args.quick else LENGTHS)
    repeats = 1 if args.quick else max(1, args.repeats)
    partial = set(lengths) != set(LENGTHS)
    path = args.out or common.SCRATCH / "quick_memory_cpu.json"
    if not (args.out or args.quick or partial):
        path = common.recorded_or_scratch("memory_cpu.json", common.machine())
    total = repeats * sum(cost(length, line.causal) for length in lengths for line in LINES)
    print(f"{len(lengths) * len(LINES) * repeats} processes, about {common.duration(total)}")
    started, begin = common.now(), time.perf_counter()
    with common.progress("memory_cpu", total) as advance:
        groups = [measure(length, repeats, advance) for length in lengths]
    threads = [s["threads"] for g in groups for r in g["lines"].values() for s in r["samples"]]
    head = common.header(
        MODULE,
        given,
        seeds={},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=threads[0] if threads else None,
    )
    payload = {**head, "goals": goal(groups), "groups": groups}
    common.write_result(path, payload, markdown(payload))
    print(markdown(payload))
    failed = any(row["status"] != "ok" for group in groups for row in group["lines"].values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
