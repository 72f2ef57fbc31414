"""The whole neural process at 100,000 context and 1,048,576 test points, in bounded memory.

    python -m benchmarks.bsa_tnp [--quick] [--queries N]
    python -m benchmarks.bsa_tnp --whole [--device cuda]

Jenson et al., "Scalable Spatiotemporal Inference with Biased Scan Attention Transformer Neural
Processes", 2025, arXiv 2506.09163: test points on a grid of 1024 x 1024 over [-32, 32]^2, context
anywhere in it, a `BSATNP` of the published size (six blocks, four heads of 32, five bases). What is
recorded goes to docs/models/bsa_tnp.md.

The context is read once (five blocks of it attend to all of it) and kept; test points go through
the six blocks in chunks. Each line is a fresh process: a slice of the context through one block, a
slice of test points through all blocks, and the latter again with twice the test points, whose
peak memory must be no higher but for the outputs; then with less context, for how memory grows. The
whole is projected from the slices: every row has the same keys. `--whole` projects nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, neural_process

MODULE = "benchmarks.bsa_tnp"
SEED, REACH = 0, 32.0
CONTEXT, SIDE = 100_000, 1024
QUERIES, CHUNK, CHECKED, WHOLE_CHUNK = 1024, 512, 2, 16384
QUICK = {"context": 1200, "side": 32, "queries": 64, "chunk": 32}
LIMIT = 1e-4  # largest error of a mean or deviation, float32 against float64
PAGE = common.ROOT / "docs" / "models" / "bsa_tnp.md"
PRICES = "<!-- prices: bsa_tnp -->\n", "<!-- end of prices -->"
TABLE = common.ROOT / "experiments" / "results" / "models" / "bsa_tnp_map.json"
LIKELIHOODS = common.IMAGES / "models" / "bsa_tnp_likelihoods.png"
SLACK = 64e6  # bytes by which peaks of like processes may differ


def model() -> Any:
    """The published model, its biases far from their start."""
    import torch

    from attnbias_models.fields.model import BSATNP
    from attnbias_models.training import seeded

    made: BSATNP = seeded(lambda: BSATNP(BSATNP.Config()), SEED)
    draw = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if ".space." in name:
                noise = torch.rand(weight.shape, generator=draw)
                weight.copy_(noise * 2 if name.endswith("1") else noise * 12 - 4)
    return made.eval()


def context(count: int) -> tuple[Any, Any]:
    """Places and values of the context."""
    import torch

    from attnbias_models.fields.batch import Points

    draw = torch.Generator().manual_seed(SEED)
    places = (torch.rand(1, count, 2, generator=draw) * 2 - 1) * REACH
    return Points(space=places), torch.randn(1, count, 1, generator=draw)


def tests(side: int, rows: range) -> Any:
    """Rows of the test grid."""
    import torch

    from attnbias_models.fields.batch import Points

    index = torch.arange(rows.start, rows.stop, rows.step)
    places = torch.stack([index // side, index % side], -1) * (2 * REACH / (side - 1)) - REACH
    return Points(space=places.float()[None])


def known(made: Any, count: int) -> Any:
    """A context as it looks after it was read: streams of the size and spread they have."""
    import torch

    from attnbias_models.fields.model import Known

    points, _ = context(count)
    draw = torch.Generator().manual_seed(SEED)
    width, passes = made.config.width, made.config.blocks * made.config.repeats
    return Known(points, [torch.randn(1, count, width, generator=draw) for _ in range(passes)])


def child(line: str, count: int, side: int, queries: int, chunk: int) -> dict[str, Any]:
    """One line in this process: seconds, peak memory, and the error of some rows."""
    import torch

    made = model()
    rows = range(0, side * side, max(1, side * side // queries))[:queries]
    with torch.no_grad():
        # What is made once (threads, compiled loops) is made before the clock starts.
        made.ask(made.read(*context(600)), tests(side, rows[:300]))
        if line == "read":
            points, _ = context(count)
            stream = known(made, count).streams[0]
            before = common.peak_bytes()["peak"]
            start = time.perf_counter()
            for i in range(0, queries, chunk):
                part = slice(i, min(i + chunk, queries))
                out = made.blocks[0](stream[:, part], stream, made.config, points[part], points)
        else:
            streams, asked = known(made, count), tests(side, rows)
            before = common.peak_bytes()["peak"]
            start = time.perf_counter()
            out = torch.cat(made.ask(streams, asked, chunk), -1)
        seconds, peak = time.perf_counter() - start, common.peak_bytes()["peak"]
        error = worst(made, streams, asked, out) if line == "check" else 0.0
    return {
        "seconds": round(seconds, 3),
        "peak": peak,
        "before": before,
        "error": error,
        "finite": bool(out.isfinite().all()),
        "threads": torch.get_num_threads(),
    }


def worst(made: Any, streams: Any, asked: Any, out: Any) -> float:
    """The largest error of some rows against the same in float64 by the reference lowering."""
    import copy

    import torch

    from attnbias_models.fields.model import Known

    double = copy.deepcopy(made).double()
    exact = Known(streams.points, [stream.double() for stream in streams.streams])
    count = out.shape[1]
    rows = torch.arange(0, count, max(1, count // CHECKED))[:CHECKED]
    want = torch.cat(double.ask(exact, asked[rows]), -1)
    return float((out[:, rows] - want).abs().max() / want.abs().max())


def measure(count: int, side: int, queries: int, chunk: int, advance: Any) -> dict[str, Any]:
    """All lines, each in a fresh process."""

    def run(line: str, n: int, m: int) -> dict[str, Any]:
        advance(0, f"{line}: {n:,} context, {m:,} rows")
        task = [line, str(n), str(side), str(m), str(chunk)]
        found: dict[str, Any] = common.fresh(MODULE, ["--child", *task])
        advance(1, line)
        return found

    read, checked = run("read", count, queries), run("check", count, queries)
    plain = run("ask", count, queries)
    twice = run("ask", count, 2 * queries)
    less = {n: run("ask", n, chunk) for n in (count // 4, count // 2, count)}
    total, blocks = side * side, 6
    growth = (less[count]["peak"] - less[count // 4]["peak"]) / (count - count // 4)
    return {
        "queries": queries,
        "chunk": chunk,
        "read": read,
        "check": checked,
        "ask": plain,
        "twice": twice,
        "context": {str(n): found for n, found in less.items()},
        "error": checked["error"],
        "bytes_per_context_point": round(growth),
        "peak_mb": round(plain["peak"] / 1e6),
        "twice_mb": round((twice["peak"] - plain["peak"]) / 1e6, 1),
        "read_minutes": round((blocks - 1) * read["seconds"] * count / queries / 60, 1),
        "ask_minutes": round(plain["seconds"] * total / queries / 60, 1),
        "bounded": twice["peak"] - plain["peak"] <= SLACK,
        "holds": checked["error"] <= LIMIT
        and all(f["finite"] for f in (read, checked, plain, twice)),
    }


def whole(count: int, side: int, device: str, advance: Any) -> dict[str, Any]:
    """All of it on a device; means and deviations stay there."""
    import torch

    cuda = device.startswith("cuda")
    made, place = model().to(device), torch.device(device)

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    points, values = context(count)
    with torch.no_grad():
        made.ask(made.read(points[:600].to(place), values[:, :600].to(place)), points[:9].to(place))
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        begin = wait()
        read = made.read(points.to(place), values.to(place), WHOLE_CHUNK)
        between = wait()
        advance(count, "context")
        for start in range(0, side * side, WHOLE_CHUNK):
            rows = range(start, min(start + WHOLE_CHUNK, side * side))
            out = made.ask(read, tests(side, rows).to(place))
            advance(len(rows), f"{rows.stop:,} of {side * side:,} test points")
        end = wait()
    peak = torch.cuda.max_memory_allocated(device) if cuda else common.peak_bytes()["peak"]
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "read_seconds": round(between - begin, 2),
        "seconds": round(end - begin, 2),
        "peak": peak,
        "finite": all(bool(part.isfinite().all()) for part in out),
        "threads": torch.get_num_threads(),
    }


def markdown(payload: dict[str, Any]) -> str:
    """The report."""
    found, size = payload["found"], payload["size"]
    title = f"# BSA-TNP at {size['context']:,} context and {size['side'] ** 2:,} test points"
    parts = [title, common.header_markdown(payload)]
    if payload["whole"]:
        rows = [
            [
                found["device"],
                f"{found['read_seconds']:.1f}",
                f"{found['seconds']:.1f}",
                f"{found['peak'] / 1e6:.0f}",
            ]
        ]
        columns = ["all of it on", "seconds, context", "seconds, all", "peak MB"]
        return "\n\n".join([*parts, common.markdown_table(columns, rows)]) + "\n"
    rows = [
        [f"{int(n):,}", f"{one['seconds']:.2f}", f"{one['peak'] / 1e6:.0f}"]
        for n, one in found["context"].items()
    ]
    parts += [
        f"A model of the published size, float32. A chunk of {found['chunk']} test points against "
        "contexts that are already read:",
        common.markdown_table(["context points", "seconds", "peak MB"], rows),
        "\n".join(
            [
                f"- Each context point costs {found['bytes_per_context_point']:,} bytes at the "
                "peak.",
                f"- {found['queries']:,} test points in chunks of {found['chunk']}: "
                f"{found['ask']['seconds']:.1f} s, peak {found['peak_mb']} MB; twice as many: "
                f"{found['twice']['seconds']:.1f} s, {found['twice_mb']} MB more "
                f"({'bounded' if found['bounded'] else 'NOT BOUNDED'}).",
                f"- Projected, reading the context: {found['read_minutes']} minutes, once; all "
                f"test points: {found['ask_minutes']} minutes on this machine.",
                f"- Rows against float64: largest error {found['error']:.1e} of the largest output "
                f"(limit {LIMIT:.0e}): {'holds' if found['holds'] else 'FALLS SHORT'}.",
                f"- All of it on a GPU: `python -m {MODULE} --whole --device cuda`.",
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def prices(page: str) -> str:
    """The page with what is recorded: of this benchmark, and of a table of 200 places."""
    said = []
    if TABLE.exists():
        one = json.loads(TABLE.read_text(encoding="utf-8"))
        ours, exact = one["bsa_tnp"], one["exact"]
        settings = ", ".join(f"{name}={value}" for name, value in one["given"].items())
        said.append(
            f"The picture: a table of {one['rows']} places of a field of deviation "
            f"{one['deviation_of_the_field']:.2f}, `FieldRegressor({settings})`: "
            f"{one['train_seconds']:.0f} s of one thread to train, {one['predict_seconds']:.1f} s "
            f"for {len(one['mean']):,} places. Error of the means (root of the mean square) "
            f"{ours['rmse']:.2f}, of the exact posterior, its process known, {exact['rmse']:.2f}; "
            f"negative log-likelihood {ours['nll']:.2f} against {exact['nll']:.2f}; within two "
            f"deviations lie {100 * ours['within_two_deviations']:.0f} %."
        )
    path = common.RESULTS / "bsa_tnp.json"
    if path.exists():
        one = json.loads(path.read_text(encoding="utf-8"))
        found, size, box = one["found"], one["size"], one["machine"]
        said.append(
            f"{size['context']:,} context and {size['side'] ** 2:,} test points, the published "
            f"size of the model, {box['cpu']}, {box['threads']} threads: projected from slices, "
            f"reading the context takes {found['read_minutes']:.0f} minutes, all test points "
            f"{found['ask_minutes']:.0f}. Peak memory {found['peak_mb']} MB, with twice the test "
            f"points {found['twice_mb']} MB more; a context point costs "
            f"{found['bytes_per_context_point']:,} bytes."
        )
    path = common.RESULTS / "neural_process.json"
    if path.exists():
        one = json.loads(path.read_text(encoding="utf-8"))
        found, threads = one["found"], one["machine"].get("threads", "?")
        said += [
            f"The published size of the model by the number of points (forward, {threads} "
            f"threads); memory grows with its power {found['memory_power']}:",
            neural_process.by_points(found["rows"]),
        ]
    if LIKELIHOODS.exists():
        said.append(
            "![Negative log-likelihoods with and without the bias]"
            f"(../images/models/{LIKELIHOODS.name})"
        )
    first, last = PRICES
    before, after = page.split(first)
    middle = "".join(f"\n{line}\n" for line in said)
    return f"{before}{first}{middle}\n{last}{after.split(last, 1)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results; `--child` is one measured process."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--quick", action="store_true", help="a tiny case, written to out/ instead")
    made.add_argument("--queries", type=int, default=QUERIES, help="test points of the slice")
    made.add_argument("--whole", action="store_true", help="all test points, nothing projected")
    made.add_argument("--device", default="cpu", help="where --whole runs: cpu, cuda, cuda:1")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    made.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = made.parse_args(given)
    if args.child:
        line, *sizes = args.child
        print(json.dumps(child(line, *(int(s) for s in sizes))))
        return 0
    count, side = (QUICK["context"], QUICK["side"]) if args.quick else (CONTEXT, SIDE)
    queries, chunk = (QUICK["queries"], QUICK["chunk"]) if args.quick else (args.queries, CHUNK)
    if not 1 <= 2 * queries <= side * side:
        made.error(f"--queries must be 1 to {side * side // 2}, got {queries}")
    name = f"bsa_tnp_whole_{args.device.partition(':')[0]}.json" if args.whole else "bsa_tnp.json"
    path = args.out or common.SCRATCH / f"quick_{name}"
    if not (args.out or args.quick or (queries != QUERIES and not args.whole)):
        path = common.recorded_or_scratch(name, common.machine())
    started, begin = common.now(), time.perf_counter()
    with common.progress("bsa-tnp", side * side + count if args.whole else 7) as advance:
        if args.whole:
            found = whole(count, side, args.device, advance)
            threads = found["threads"]
        else:
            found = measure(count, side, queries, chunk, advance)
            threads = found["ask"]["threads"]
    head = common.header(
        MODULE,
        given,
        seeds={"problem": SEED},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=threads,
    )
    size = {"context": count, "side": side}
    payload = {**head, "size": size, "whole": args.whole, "found": found}
    common.write_result(path, payload, markdown(payload))
    if path == common.RESULTS / "bsa_tnp.json":
        common.write_text(PAGE, prices(PAGE.read_text(encoding="utf-8")))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0 if args.whole or (found["holds"] and found["bounded"]) else 1


if __name__ == "__main__":
    sys.exit(main())
