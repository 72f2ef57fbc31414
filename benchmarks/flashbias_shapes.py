"""The public benchmark shapes of FlashBias, on CPU: biased over unbiased attention, one run.

    python -m benchmarks.flashbias_shapes [--quick] [--budget SECONDS] [--out FILE]

Two shapes, 256 to 16,384 tokens, float32: a low-rank bias (batch 2, 4 heads of 32, rank 8, factors
N(0, 1), not causal) and ALiBi (batch 1, 50 heads of 32, causal). Lines: unbiased attention (the
floor; causal where the bias is), ours by the planner's choice, stock attention with the dense mask
made before, and compiled FlexAttention with the bias as a score function; the forward, and the
forward with gradients to query, key and value for the shorter lengths.

Lines take turns; the ratio is of medians, over the floor of the same rounds. The output of every
line is checked against float64 on sampled rows. A cell that does not fit, is not available or is
left out because the time budget ends says so; small lengths come first.

Source: Wu et al., "FlashBias: Fast Computation of Attention with Bias", 2025, arXiv 2505.12044; the
shapes of its kernel benchmark. Theirs are half precision on a GPU: compare ratios, not times.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attnbias as ab
from benchmarks import common
from benchmarks.lines import NotAvailable

MODULE = "benchmarks.flashbias_shapes"
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384)
TRAINED = (256, 512, 1024, 2048, 4096)
QUICK_LENGTHS = (256,)
SIZE, RANK, SEED, SAMPLED = 32, 8, 40, 8
FLOOR, OURS, DENSE, FLEX = "unbiased", "ours", "dense mask", "flex"
# Times over the floor, roughly, for the estimate of the duration alone.
COSTS = {FLOOR: 1.0, OURS: 1.3, DENSE: 1.5, FLEX: 2.0}
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """One shape at one length."""

    name: str
    batch: int
    heads: int
    length: int
    backward: bool

    @property
    def causal(self) -> bool:
        return self.name == "alibi"

    @cached_property
    def inputs(self) -> tuple[Tensor, ...]:
        """Query, key, value and a gradient of the output."""
        gen = torch.Generator().manual_seed(SEED)
        size = (self.batch, self.heads, self.length, SIZE)
        made = [torch.randn(size, generator=gen) for _ in range(4)]
        return (*(t.requires_grad_(self.backward) for t in made[:3]), made[3])

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        gen = torch.Generator().manual_seed(SEED + 1)
        size = (self.batch, self.heads, self.length, RANK)
        return torch.randn(size, generator=gen), torch.randn(size, generator=gen)

    @cached_property
    def slopes(self) -> Tensor:
        return ab.forms.alibi_slopes(self.heads)

    @cached_property
    def bias(self) -> ab.Bias:
        if self.name == "low rank":
            return ab.LowRank(*self.factors)
        made: ab.Bias = ab.forms.ALiBi(self.heads)(self.length)
        return made

    def entries(self, rows: Tensor, kind: torch.dtype) -> Tensor:
        """The bias of some queries ``(batch | 1, heads, rows, keys)``, not by the library."""
        if self.name == "low rank":
            u, v = (t.to(kind) for t in self.factors)
            return u[:, :, rows] @ v.mT
        distance = torch.arange(self.length) - rows[:, None]
        made = -self.slopes.to(kind)[:, None, None] * distance.abs().to(kind)
        return made.masked_fill_(distance > 0, -math.inf)[None]

    def dense(self) -> Tensor:
        """The matrix as a user has it: made once, outside of what is timed."""
        batch = self.batch if self.name == "low rank" else 1
        need = 4 * batch * self.heads * self.length**2
        free = int(0.8 * common.memory_bytes()[1])
        if need > free:
            raise NotAvailable(f"does not fit: {need / 1e9:.1f} GB, free {free / 1e9:.1f} GB")
        made = torch.empty(batch, self.heads, self.length, self.length)
        for start in range(0, self.length, 256):
            rows = torch.arange(start, min(start + 256, self.length))
            made[:, :, start : start + 256] = self.entries(rows, torch.float32)
        return made

    def answer(self, rows: Tensor) -> Tensor:
        """The output of some queries in float64."""
        q, k, v = (t.detach().double() for t in self.inputs[:3])
        scores = q[:, :, rows] @ k.mT * SIZE**-0.5 + self.entries(rows, torch.float64)
        return scores.softmax(-1) @ v


def shapes(lengths: Sequence[int]) -> list[Shape]:
    """Small lengths first: what the budget leaves out are the largest."""
    kinds = (("low rank", 2, 4), ("alibi", 1, 50))
    return [
        Shape(*kind, length, backward)
        for length in lengths
        for kind in kinds
        for backward in (False, True)
        if not backward or length in TRAINED
    ]


def flex(shape: Shape) -> Forward:
    """Compiled FlexAttention with the bias as a score function."""
    if shape.backward:
        raise NotAvailable("FlexAttention has no backward on CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    n, slopes = shape.length, shape.slopes
    blocks = None
    if shape.causal:
        blocks = create_block_mask(lambda b, h, i, j: i >= j, None, None, n, n, device="cpu")

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return value - slopes[h] * (i - j).abs()
    else:
        u, v = shape.factors

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            for r in range(RANK):
                value = value + u[b, h, i, r] * v[b, h, j, r]
            return value

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made: Tensor = compiled(q, k, v, score_mod=score, block_mask=blocks)
        return made

    try:
        with torch.no_grad():
            forward(*shape.inputs[:3])
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        raise NotAvailable(f"{type(error).__name__}: {words[0][:160]}") from error
    return forward


def build(shape: Shape, line: str) -> Forward:
    """The forward of a line, with what is made before it."""
    if line == FLOOR:
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
    if line == FLEX:
        return flex(shape)
    if line == DENSE:
        mask = shape.dense()
        return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    bias, causal = shape.bias, shape.causal

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = ab.attention(q, k, v, bias=bias, causal=causal)
        assert isinstance(made, Tensor)
        return made

    return ours


def timed(shape: Shape, forward: Forward) -> Callable[[], Any]:
    """The forward without a graph, or with gradients to query, key and value."""
    q, k, v, grad = shape.inputs

    def alone() -> Tensor:
        with torch.no_grad():
            return forward(q, k, v)

    def both() -> Tensor:
        output = forward(q, k, v)
        torch.autograd.grad(output, (q, k, v), grad)
        return output

    return both if shape.backward else alone


def measure(shape: Shape, budget: float) -> dict[str, Any]:
    """Every line of a shape: time, ratio to the floor and error, or why there is none."""
    cells: dict[str, dict[str, Any]] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for line in COSTS:
        try:
            calls[line] = timed(shape, build(shape, line))
            cells[line] = {"status": "ok"}
        except NotAvailable as error:
            cells[line] = {"status": "not available", "reason": str(error)}
    q, k, v = shape.inputs[:3]
    chosen = ab.explain(q, k, v, bias=shape.bias, causal=shape.causal).offers[0]
    cells[OURS] |= {"lowering": chosen.lowering, "offered": round(chosen.time, 3)}
    rows = torch.linspace(0, shape.length - 1, SAMPLED).long().unique()
    answer = shape.answer(rows)

    def inspect(line: str, output: Tensor) -> None:
        if line != FLOOR:
            gap = (output.detach()[:, :, rows].double() - answer).abs().max()
            cells[line]["error"] = float(f"{float(gap):.3g}")

    def failed(line: str, error: Exception) -> None:
        cells[line] = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:200]}

    warm = int(shape.length <= 4096)
    timings = common.interleave(
        calls, budget=budget, least=2, warmups=warm, inspect=inspect, on_error=failed
    )
    for line, timing in timings.items():
        ratios = timing.over(timings[FLOOR])
        cells[line] |= timing.record() | {name: round(x, 4) for name, x in ratios.items()}
    return {
        "shape": shape.name,
        "length": shape.length,
        "backward": shape.backward,
        "rounds": len(timings[FLOOR].samples),
        "lines": cells,
    }


def expected(shape: Shape, floor: float, budget: float) -> float:
    """Seconds that a shape takes, from the floor's seconds for a score of the forward."""
    scores = shape.batch * shape.heads * shape.length**2 / (2 if shape.causal else 1)
    one = floor * scores * (3.6 if shape.backward else 1.0)
    whole = one * sum(COSTS.values())
    compiling = 0.0 if shape.backward else 8.0
    return whole * (common.rounds_for(whole, budget=budget, least=2) + 1) + compiling


def speed() -> float:
    """Seconds of the floor for a score."""
    shape = Shape("low rank", 1, 4, 1024, False)
    found = common.interleave({FLOOR: timed(shape, build(shape, FLOOR))}, budget=0.2)
    return found[FLOOR].low / (4 * 1024**2)


def markdown(payload: dict[str, Any]) -> str:
    """The report: one table for a shape and direction."""
    parts = ["# FlashBias's benchmark shapes on CPU", "", common.header_markdown(payload), ""]
    parts += ["Ratios to unbiased attention of the same run; ours with the lowering chosen.", ""]
    groups = payload["groups"]
    for name, backward in sorted({(g["shape"], g["backward"]) for g in groups}):
        words = "forward and gradients to query, key, value" if backward else "forward"
        parts += [f"## {name}, {words}", ""]
        rows = []
        for group in groups:
            if (group["shape"], group["backward"]) == (name, backward):
                lines = group.get("lines", {})
                floor = lines.get(FLOOR, {}).get("median_s")
                rows.append(
                    (
                        f"{group['length']:,}",
                        group.get("reason") or f"{1e3 * floor:.1f} ms",
                        *(words_of(lines.get(line, {})) for line in (OURS, DENSE, FLEX)),
                    )
                )
        parts += [common.markdown_table(("tokens", FLOOR, OURS, DENSE, FLEX), rows), ""]
    return "\n".join(parts)


def words_of(cell: dict[str, Any]) -> str:
    if "ratio" not in cell:
        return str(cell.get("reason", ""))
    chosen = f" {cell['lowering']}" if "lowering" in cell else ""
    return f"{cell['ratio']:.2f}{chosen} (error {cell['error']:.0e})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="one length, written to out/ instead")
    made.add_argument("--budget", type=float, default=330.0, help="seconds in all, roughly")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    args = made.parse_args(given)
    path = args.out or common.SCRATCH / "quick_flashbias_shapes.json"
    if not (args.out or args.quick):
        path = common.recorded_or_scratch("flashbias_shapes.json", common.machine())
    todo = shapes(QUICK_LENGTHS if args.quick else LENGTHS)
    started, begin = common.now(), time.perf_counter()
    floor, each = speed(), 0.05 if args.quick else 2.0
    costs = [expected(shape, floor, each) for shape in todo]
    print(f"{len(todo)} groups, about {common.duration(min(sum(costs), args.budget))}", flush=True)
    groups: list[dict[str, Any]] = []
    with common.progress("flashbias_shapes", sum(costs)) as advance:
        for shape, cost in zip(todo, costs, strict=True):
            direction = "training" if shape.backward else "forward"
            name = f"{shape.name}, {shape.length:,} tokens, {direction}"
            advance(0, name)
            if time.perf_counter() - begin + cost > args.budget:
                words = f"left out: {common.duration(cost)} more than the budget has"
                groups.append(
                    {
                        "shape": shape.name,
                        "length": shape.length,
                        "backward": shape.backward,
                        "reason": words,
                    }
                )
            else:
                groups.append(measure(shape, each))
            advance(cost, name)
            head = common.header(
                MODULE,
                given,
                seeds={"inputs": SEED, "factors": SEED + 1},
                started=started,
                seconds=time.perf_counter() - begin,
                threads=torch.get_num_threads(),
            )
            payload = {**head, "groups": groups}
            common.write_result(path, payload, markdown(payload))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    cells = [cell for group in groups for cell in group.get("lines", {}).values()]
    return 1 if any(cell["status"] == "failed" for cell in cells) else 0


if __name__ == "__main__":
    sys.exit(main())
