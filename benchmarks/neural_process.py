"""A neural process by its number of points: time and memory of BSA-TNP.

    python -m benchmarks.neural_process [--quick]

Jenson et al., "Scalable Spatiotemporal Inference with Biased Scan Attention Transformer Neural
Processes", 2025, arXiv 2506.09163: the published model (6 blocks of width 64, 4 heads of 32, 5
radial functions of the distance) with weights as they start reads n context points and is asked for
4 n test points, in chunks, each in a fresh process, beside the same model without a bias. The case
of 100,000 context and 1,048,576 test points has a benchmark of its own, `benchmarks.bsa_tnp`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

MODULE = "benchmarks.neural_process"
SIZES, TIMES_TEST, CHUNK, SEED, REACH = (2000, 4000, 8000, 16000), 4, 2048, 0, 4.0
QUICK = (200, 400)
LINES = ("none", "rbf")
HEADS, BLOCKS = 4, 6


def make(context: int, test: int, kind: str) -> tuple[Any, Any, Any, Any]:
    """A model, context points, their values, test points; nothing of it is trained."""
    import torch

    from attnbias_models import training
    from attnbias_models.fields.batch import Points
    from attnbias_models.fields.model import BSATNP, BSATNPConfig

    config = BSATNPConfig(space=2, kind=kind, blocks=BLOCKS, heads=HEADS)
    model = training.seeded(lambda: BSATNP(config), SEED).eval()
    draw = training.generator("neural process", SEED)
    side = math.isqrt(test)
    index = torch.arange(test)
    grid = torch.stack([index // side, index % side], -1) * (2 * REACH / max(1, side - 1)) - REACH
    known = Points(space=(torch.rand(1, context, 2, generator=draw) * 2 - 1) * REACH)
    values = torch.randn(1, context, 1, generator=draw)
    return model, known, values, Points(space=grid.float()[None])


def growth(kind: str, context: int, test: int) -> dict[str, Any]:
    """Read the context and ask the test points; seconds and peak memory of this process."""
    import torch

    with torch.no_grad():
        warm(kind)
        model, known, values, asked = make(context, test, kind)
        before = common.peak_bytes()["peak"]
        start = time.perf_counter()
        read = model.read(known, values, CHUNK)
        middle = time.perf_counter()
        mean, std = model.ask(read, asked, CHUNK)
        end = time.perf_counter()
        peak = common.peak_bytes()["peak"]
        # A chunk must not matter, and the points must.
        rows = slice(0, 64)
        alone, _ = model.ask(read, asked[rows])
        apart = float((alone - mean[:, rows]).abs().max() / mean.abs().max())
        other = float(mean.std() / mean.abs().max())
    return {
        "read_seconds": round(middle - start, 3),
        "ask_seconds": round(end - middle, 3),
        "before": before,
        "peak": peak,
        "chunk_error": apart,
        "spread": other,
        "finite": bool(mean.isfinite().all() and std.isfinite().all()),
        "threads": torch.get_num_threads(),
    }


def warm(kind: str) -> None:
    """What is made once (threads, compiled loops, buffers) is made before the clock starts."""
    model, known, values, asked = make(600, 300, kind)
    model.ask(model.read(known, values, 256), asked, 256)


def measure(sizes: Sequence[int], advance: Any) -> dict[str, Any]:
    """Every line in a fresh process."""
    rows = []
    for size in sizes:
        row: dict[str, Any] = {"context": size, "test": TIMES_TEST * size}
        for kind in LINES:
            advance(0, f"{size:,} context points, {kind}")
            row[kind] = common.fresh(MODULE, ["--child", kind, str(size), str(row["test"])])
            advance(1, f"{size:,} context points, {kind}")
        row["extra_mb"] = round((row["rbf"]["peak"] - row["rbf"]["before"]) / 1e6, 1)
        row["dense_mb"] = round(4 * HEADS * size * row["test"] / 1e6, 1)
        rows.append(row)
    return {"rows": rows, **summary(rows)}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What follows from the samples."""
    small, large = rows[0], rows[-1]
    power = math.log(max(large["extra_mb"], 1.0) / max(small["extra_mb"], 1.0))
    power /= math.log(large["context"] / small["context"])
    every = [row[kind] for row in rows for kind in LINES]
    worst = max(one["chunk_error"] for one in every)
    return {
        "memory_power": round(power, 2),
        "chunk_error": worst,
        "holds": all(one["finite"] for one in every)
        and worst < 1e-4
        # Below a chunk's own memory, in a quick run, a power says nothing.
        and (power < 1.3 or large["context"] < SIZES[0]),
    }


def by_points(rows: Sequence[dict[str, Any]]) -> str:
    """Seconds and memory by the number of points, as a table."""
    table = []
    for row in rows:
        seconds = [f"{row[k]['read_seconds'] + row[k]['ask_seconds']:.2f}" for k in LINES]
        table.append(
            [f"{row['context']:,}", f"{row['test']:,}", *seconds, row["extra_mb"], row["dense_mb"]]
        )
    head = ["context", "test", "s, no bias", "s, RBF", "extra MB", "bias as a tensor, MB"]
    return common.markdown_table(head, table)


def markdown(payload: dict[str, Any]) -> str:
    """The report."""
    found = payload["found"]
    parts = ["# A neural process by its number of points", common.header_markdown(payload)]
    return (
        "\n\n".join(
            [
                *parts,
                f"The published model, {BLOCKS} blocks, float32, forward, in chunks of {CHUNK:,} "
                "points. The memory is what the process rose by.",
                by_points(found["rows"]),
                f"- Memory grows with the power {found['memory_power']} of the number of points "
                "(1 is linear; a bias as a tensor has 2).",
                f"- A chunk asked alone differs by {found['chunk_error']:.1e} of the largest mean.",
            ]
        )
        + "\n"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; `--child` is one measured process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--quick", action="store_true", help="a tiny case, written to out/ instead")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    made.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = made.parse_args(given)
    if args.child:
        kind, *numbers = args.child
        print(json.dumps(growth(kind, *(int(number) for number in numbers))))
        return 0
    sizes = QUICK if args.quick else SIZES
    path = args.out or common.SCRATCH / "quick_neural_process.json"
    if not (args.out or args.quick):
        path = common.recorded_or_scratch("neural_process.json", common.machine())
    started, begin = common.now(), time.perf_counter()
    with common.progress("neural process", len(sizes) * len(LINES)) as advance:
        found = measure(sizes, advance)
    head = common.header(
        MODULE,
        given,
        seeds={"problem": SEED},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=found["rows"][0][LINES[0]]["threads"],
    )
    size = {"contexts": list(sizes), "chunk": CHUNK}
    payload = {**head, "size": size, "found": found}
    common.write_result(path, payload, markdown(payload))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
