"""The great case of biased scan attention: 100,000 context and 1,048,576 test points.

    python -m benchmarks.bsa_slice [--quick] [--queries N]
    python -m benchmarks.bsa_slice --whole [--device cuda]

Jenson et al., "Scalable Spatiotemporal Inference with Biased Scan Attention Transformer Neural
Processes", 2025, arXiv 2506.09163: test points on a grid of 1024 x 1024 over [-32, 32]^2, context
anywhere in it, 4 heads of 32, a network of 5 radial basis functions of the distance. The bias alone
would be 1.7 TB in float32.

Here a slice of the test points, spread evenly over the grid, attends to the whole context, in a
fresh process beside one that does the same without a bias; time grows with the number of queries,
so the whole is that times a factor. Rows of the slice are compared to a float64 loop. `--whole`
runs all test points on a device, slice after slice.
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

MODULE = "benchmarks.bsa_slice"
HEADS, DIM, BASES, SEED, REACH = 4, 32, 5, 0, 32.0
CONTEXT, SIDE = 100_000, 1024
QUERIES, WHOLE_STEP, CHECKED, REPEATS = 2048, 16384, 12, 2
QUICK = {"context": 1500, "side": 32, "queries": 200}
LIMIT = 1e-4  # largest error of an output over the largest output, float32 against float64
LINES = ("unbiased", "RBF network")


def make(context: int, side: int, rows: range, device: str) -> dict[str, Any]:
    """Queries, keys, values, their places and the form, on a device; rows of the test grid."""
    import torch

    import attnbias as ab

    draw = torch.Generator().manual_seed(SEED)
    k, v = (torch.randn(1, HEADS, context, DIM, generator=draw) for _ in range(2))
    keys = (torch.rand(context, 2, generator=draw) * 2 - 1) * REACH
    a = torch.randn(HEADS, BASES, generator=draw)
    b = torch.rand(HEADS, BASES, generator=draw) * 2
    form = ab.forms.BSA("rbf", HEADS, space=[a.to(device), b.to(device)])
    # Each row its own generator would be slow: queries are drawn in the order of the slice.
    q = torch.randn(1, HEADS, len(rows), DIM, generator=draw.manual_seed(SEED + 1 + rows.start))
    index = torch.arange(rows.start, rows.stop, rows.step)
    places = torch.stack([index // side, index % side], -1) * (2 * REACH / (side - 1)) - REACH
    made = {"q": q, "k": k, "v": v, "x": places.float(), "y": keys}
    return {name: t.to(device) for name, t in made.items()} | {"form": form}


def attend(given: dict[str, Any], biased: bool) -> Any:
    """The attention measured; without a bias PyTorch's fused operator."""
    import torch

    import attnbias as ab

    with torch.no_grad():
        if not biased:
            return torch.nn.functional.scaled_dot_product_attention(
                given["q"], given["k"], given["v"]
            )
        bias = given["form"](given["x"], given["y"])
        return ab.attention(given["q"], given["k"], given["v"], bias=bias, lowering="stream")


def worst(given: dict[str, Any], out: Any, count: int) -> float:
    """The largest error of some rows against a float64 loop, over the largest output of them."""
    import torch

    worst, largest = 0.0, 0.0
    a, b = (p.double() for p in given["form"].space)
    n = out.shape[2]
    for row in range(0, n, max(1, n // count)):
        square = (given["x"][row].double() - given["y"].double()).square().sum(-1)
        for head in range(HEADS):
            score = given["k"][0, head].double() @ given["q"][0, head, row].double() / DIM**0.5
            for f in range(BASES):
                score += a[head, f] * torch.exp(-b[head, f] * square)
            want = torch.softmax(score, 0) @ given["v"][0, head].double()
            worst = max(worst, float((out[0, head, row].double() - want).abs().max()))
            largest = max(largest, float(want.abs().max()))
    return worst / largest


def spread(side: int, queries: int) -> range:
    """Test points spread evenly over the grid."""
    step = max(1, side * side // queries)
    return range(0, step * queries, step)


def child(line: str, context: int, side: int, queries: int) -> dict[str, Any]:
    """One line in this process: seconds, peak memory, and the error of some rows."""
    import torch

    biased = line != LINES[0]
    # What is made once (threads, compiled loops, buffers) is made before the clock starts.
    attend(make(600, 32, range(300), "cpu"), biased)
    given = make(context, side, spread(side, queries), "cpu")
    before = common.peak_bytes()["peak"]
    start = time.perf_counter()
    out = attend(given, biased)
    seconds = time.perf_counter() - start
    peak = common.peak_bytes()["peak"]
    found = {
        "seconds": round(seconds, 3),
        "peak": peak,
        "before": before,
        "threads": torch.get_num_threads(),
        "finite": bool(out.isfinite().all()),
    }
    if biased:
        found["error"] = worst(given, out, CHECKED)
        other = attend(given, False)
        found["without"] = float((out - other).abs().max() / out.abs().max())
    return found


def whole(context: int, side: int, device: str, advance: Any) -> dict[str, Any]:
    """All test points on a device, slice after slice; outputs stay on the device."""
    import torch

    cuda = device.startswith("cuda")
    total, seconds, error = side * side, 0.0, 0.0
    attend(make(600, 32, range(300), device), True)
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    for start in range(0, total, WHOLE_STEP):
        rows = range(start, min(start + WHOLE_STEP, total))
        given = make(context, side, rows, device)
        if cuda:
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        out = attend(given, True)
        if cuda:
            torch.cuda.synchronize(device)
        seconds += time.perf_counter() - begin
        error = max(error, worst(given, out, 2))
        advance(len(rows), f"{rows.stop:,} of {total:,} test points")
    peak = torch.cuda.max_memory_allocated(device) if cuda else common.peak_bytes()["peak"]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "seconds": round(seconds, 2),
        "peak": peak,
        "error": error,
        "threads": torch.get_num_threads(),
    }


def measure(context: int, side: int, queries: int, advance: Any) -> dict[str, Any]:
    """Both lines in turns, each in fresh processes."""
    samples: dict[str, list[dict[str, Any]]] = {line: [] for line in LINES}
    for _ in range(REPEATS):
        for line in LINES:
            advance(0, line)
            task = [line, str(context), str(side), str(queries)]
            samples[line].append(common.fresh(MODULE, ["--child", *task]))
            advance(1, line)
    floor, biased = (min(s["seconds"] for s in samples[line]) for line in LINES)
    peaks = [max(s["peak"] for s in samples[LINES[1]]), min(s["peak"] for s in samples[LINES[0]])]
    error = max(s["error"] for s in samples[LINES[1]])
    return {
        "queries": queries,
        "samples": samples,
        "seconds": biased,
        "floor_seconds": floor,
        "ratio": round(biased / floor, 3),
        "peak_mb": round(peaks[0] / 1e6, 1),
        "extra_mb": round((peaks[0] - peaks[1]) / 1e6, 1),
        "dense_gb": round(4 * HEADS * queries * context / 1e9, 1),
        "whole_dense_tb": round(4 * HEADS * side * side * context / 1e12, 2),
        "error": error,
        "without": min(s["without"] for s in samples[LINES[1]]),
        "holds": error <= LIMIT and all(s["finite"] for s in samples[LINES[1]]),
        "whole_minutes": round(biased * side * side / queries / 60, 1),
        "whole_unbiased_minutes": round(floor * side * side / queries / 60, 1),
        # Six blocks, in each of which the context attends to itself as well.
        "model_minutes": round(6 * biased * (side * side + context) / queries / 60, 1),
    }


def markdown(payload: dict[str, Any]) -> str:
    """The report."""
    found, size = payload["found"], payload["size"]
    parts = [
        f"# Biased scan attention at {size['context']:,} context and {size['side'] ** 2:,} test "
        "points",
        common.header_markdown(payload),
        f"{size['context']:,} context points, {size['side'] ** 2:,} test points on a grid, "
        f"{HEADS} heads of {DIM}, {BASES} radial basis functions of the distance, float32, "
        "forward.",
    ]
    if payload["whole"]:
        rows = [[found["device"], f"{found['seconds']:.1f}", f"{found['peak'] / 1e6:.0f}"]]
        parts += [
            common.markdown_table(["all test points on", "seconds", "peak MB"], rows),
            f"Largest error of the rows checked: {found['error']:.1e} of the largest output.",
        ]
        return "\n\n".join(parts) + "\n"
    whole_gb = found["whole_dense_tb"] * 1000
    table = [
        ["without a bias", f"{found['floor_seconds']:.2f}", f"{found['whole_unbiased_minutes']}"],
        ["RBF network", f"{found['seconds']:.2f}", f"{found['whole_minutes']}"],
    ]
    parts += [
        f"A slice of {found['queries']:,} test points, the best of {REPEATS} fresh processes:",
        common.markdown_table(["line", "seconds, slice", "minutes, whole (projected)"], table),
        f"- {found['ratio']:.2f} of the attention without a bias (PyTorch's fused operator).",
        f"- Peak memory {found['peak_mb']:.0f} MB, {found['extra_mb']:.0f} MB more than without "
        f"the bias; the bias of the slice as a tensor: {found['dense_gb']:,} GB, of the whole "
        f"{whole_gb:,.0f} GB.",
        f"- Rows against a float64 loop: largest error {found['error']:.1e} of the largest output "
        f"(limit {LIMIT:.0e}): {'holds' if found['holds'] else 'FALLS SHORT'}. Without the bias "
        f"outputs differ by {found['without']:.1e}.",
        f"- The six blocks of the paper's model (the context attends to itself in each): "
        f"{found['model_minutes']} minutes of attention on this machine, projected. Time is linear "
        "in the number of queries: each has the same keys.",
        f"- All of it on a GPU: `python -m {MODULE} --whole --device cuda`.",
    ]
    return "\n\n".join(parts[:5]) + "\n\n" + "\n".join(parts[5:]) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; `--child` is one measured process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--quick", action="store_true", help="a tiny case, written to out/ instead")
    made.add_argument("--queries", type=int, default=QUERIES, help="test points of the slice")
    made.add_argument("--whole", action="store_true", help="all test points, nothing projected")
    made.add_argument("--device", default="cpu", help="where --whole runs: cpu, cuda, cuda:1")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    made.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = made.parse_args(given)
    if args.child:
        line, *sizes = args.child
        print(json.dumps(child(line, *(int(s) for s in sizes))))
        return 0
    context, side = (QUICK["context"], QUICK["side"]) if args.quick else (CONTEXT, SIDE)
    queries = QUICK["queries"] if args.quick else args.queries
    if not 1 <= queries <= side * side:
        made.error(f"--queries must be 1 to {side * side}, got {queries}")
    name = f"bsa_whole_{args.device.partition(':')[0]}.json" if args.whole else "bsa_slice.json"
    path = args.out or common.SCRATCH / f"quick_{name}"
    if not (args.out or args.quick or (queries != QUERIES and not args.whole)):
        path = common.recorded_or_scratch(name, common.machine())
    started, begin = common.now(), time.perf_counter()
    with common.progress("bsa", side * side if args.whole else REPEATS * len(LINES)) as advance:
        if args.whole:
            found = whole(context, side, args.device, advance)
            threads = found["threads"]
        else:
            found = measure(context, side, queries, advance)
            threads = found["samples"][LINES[0]][0]["threads"]
    head = common.header(
        MODULE,
        given,
        seeds={"problem": SEED},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=threads,
    )
    size = {"context": context, "side": side, "heads": HEADS, "dim": DIM, "bases": BASES}
    payload = {**head, "size": size, "whole": args.whole, "found": found}
    common.write_result(path, payload, markdown(payload))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0 if args.whole or found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
