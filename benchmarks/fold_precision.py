"""ALiBi folded into queries and keys: the naive columns lose whole logits in half formats.

    python -m benchmarks.fold_precision [--quick] [--out FILE]

The naive columns are the published recipe: positions and slopes cast to the format of the queries,
``q' = [q, slope / scale, -slope i / scale]``, ``k' = [k, j, 1]``. Integer positions are exact to
2,048 in float16 and to 256 in bfloat16, and float32 accumulates numbers as large as the positions.
Ours are what the lowering `fold` gives to the operator for the same factors: centred on blocks of
queries, without what softmax cannot see, split in parts of the format.

The last 256 queries see causally; heads of 64, slopes 1/2 and 1/32. The error of a score is half
the spread of its error over a query's last 64 keys (softmax sees differences alone), the largest of
all queries and heads; the error of the output is absolute, values N(0, 1). Both against float64 on
the same rounded queries, keys and values.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.attention import _problem
from attnbias.lowering import columns, flash, fold
from benchmarks import common

MODULE = "benchmarks.fold_precision"
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
QUICK_LENGTHS = (512, 4096)
FORMATS = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
SLOPES = (2.0**-1, 2.0**-5)
HEADS, DIM, ROWS, NEAR = len(SLOPES), 64, 256, 64
SEED = 31


def factors(length: int) -> ab.LowRank:
    """ALiBi of the last queries over all keys: ``slope (j - i)``, kept in float64."""
    slopes = torch.tensor(SLOPES).double()[:, None]
    i = torch.arange(length - ROWS, length).double()
    j = torch.arange(length).double()
    u = torch.stack([slopes.expand(-1, ROWS), -slopes * i], -1)
    v = torch.stack([j, torch.ones_like(j)], -1)
    return ab.LowRank(u, v[None])


def naive(q: Tensor, k: Tensor, bias: ab.LowRank) -> tuple[Tensor, Tensor]:
    """Queries and keys with the factors cast to their format."""
    u, v = (bias.u * DIM**0.5).to(q.dtype), bias.v.to(k.dtype)
    return torch.cat([q, u], -1), torch.cat([k, v.expand(*k.shape[:3], -1)], -1)


def scores(q: Tensor, k: Tensor, rows: Tensor | None) -> Tensor:
    """What the operator has before its softmax: products of the format summed in float32."""
    made = (q.float() @ k.float().mT) * DIM**-0.5
    return made if rows is None else made + rows


def near_error(got: Tensor, want: Tensor) -> float:
    """Half the spread of the error over each query's last keys, the largest of all."""
    m = want.shape[-1]
    seen = torch.arange(m - ROWS, m)[:, None] - torch.arange(NEAR)
    index = seen.clamp(min=0).expand(*want.shape[:2], -1, -1)
    gap = (got.double() - want).gather(-1, index)
    return float((gap.amax(-1) - gap.amin(-1)).amax()) / 2


def measure(length: int, kind: torch.dtype) -> dict[str, Any]:
    """One length and format: errors of the naive columns and of ours, and the bound of ours."""
    gen = torch.Generator().manual_seed(SEED)
    q, k, v = (torch.randn(1, HEADS, n, DIM, generator=gen) for n in (ROWS, length, length))
    q, k, v = q.to(kind), k.to(kind), v.to(kind)
    bias = factors(length)
    entries = bias.dense()
    want = q.double() @ k.double().mT * DIM**-0.5 + entries
    late = torch.arange(length) > torch.arange(length - ROWS, length)[:, None]
    mask = torch.zeros(late.shape).masked_fill_(late, -torch.inf)
    answer = want.masked_fill(late, -torch.inf).softmax(-1) @ v.double()

    def output_error(out: Tensor) -> float:
        return float((out.double() - answer).abs().max())

    wide = naive(q, k, bias)
    out, _ = flash.flash(*wide, v, mask=mask, scale=DIM**-0.5)
    found: dict[str, Any] = {
        "length": length,
        "naive_score": near_error(scores(*wide, None), want),
        "naive_output": output_error(out),
    }
    problem = _problem(q, k, v, bias, True, None, None)
    plan = columns.folding(problem)
    found |= {"bound": plan.error, "columns": plan.width, "blocks": len(plan.blocks)}
    if plan.refusal:
        return {**found, "refused": plan.refusal}
    made, keys, _ = fold.widen(problem, plan.queries(), plan.keys())
    row, shift = fold.key_rows(problem, plan, plan.row, False)
    parts = []
    for number, block in enumerate(plan.blocks):
        added = row(number)
        parts.append(scores(made[:, :, block], keys, None if added is None else added[:, :, None]))
    got = torch.cat(parts, 2).double()
    if shift is not None:
        got = got + shift[..., None]
    found["score"] = near_error(got, want)
    with torch.no_grad():
        ours = ab.attention(q, k, v, bias=bias, causal=True, lowering="fold")
    assert isinstance(ours, Tensor)
    found["output"] = output_error(ours)
    return found


def rounded(number: Any) -> Any:
    """Four digits; None for what is not finite (a column beyond the format's largest number)."""
    if not isinstance(number, float):
        return number
    return float(f"{number:.4g}") if math.isfinite(number) else None


def shown(number: float | None) -> str:
    return "overflow" if number is None else f"{number:.2g}"


def markdown(payload: dict[str, Any]) -> str:
    """The report."""
    lines = ["# Folding ALiBi: naive columns and ours", "", common.header_markdown(payload), ""]
    words = __doc__.split("\n\n")
    lines += [words[2].strip(), "", words[3].strip(), ""]
    for name, cells in payload["formats"].items():
        lines += [f"## {name}", ""]
        rows = [
            (
                f"{c['length']:,}",
                shown(c["naive_score"]),
                shown(c["score"]) if "score" in c else "refused",
                shown(c["bound"]),
                shown(c["naive_output"]),
                shown(c["output"]) if "output" in c else "refused",
            )
            for c in cells
        ]
        head = ("tokens", "naive, score", "ours, score", "bound", "naive, output", "ours, output")
        lines += [common.markdown_table(head, rows), ""]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    made.add_argument("--quick", action="store_true", help="two lengths, written to out/ instead")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/...)")
    args = made.parse_args(given)
    path = args.out or common.SCRATCH / "quick_fold_precision.json"
    if not (args.out or args.quick):
        path = common.recorded_or_scratch("fold_precision.json", common.machine())
    lengths = QUICK_LENGTHS if args.quick else LENGTHS
    started, begin = common.now(), time.perf_counter()
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMATS}
    with common.progress("fold_precision", sum(lengths) * len(FORMATS)) as advance:
        for length in lengths:
            for name, kind in FORMATS.items():
                advance(0, f"{name}, {length:,} tokens")
                cell = measure(length, kind)
                found[name].append({k: rounded(x) for k, x in cell.items()})
                advance(length, f"{name}, {length:,} tokens")
    head = common.header(
        MODULE,
        given,
        seeds={"inputs": SEED},
        started=started,
        seconds=time.perf_counter() - begin,
        threads=torch.get_num_threads(),
    )
    payload = {**head, "formats": found}
    common.write_result(path, payload, markdown(payload))
    print(path.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
