"""The report of a card: goals, ceilings, and every line of every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.gpu.work import SCRIPTS, script

UNITS = {
    "copy": (1e12, "TB/s copied (read and written)"),
    "bfloat16": (1e12, "TFLOP/s, products in bfloat16"),
    "float16": (1e12, "TFLOP/s, products in float16"),
    "tf32": (1e12, "TFLOP/s, products in tf32"),
    "float32": (1e12, "TFLOP/s, products in float32"),
    "exp2": (1e12, "T exponentials/s in a kernel"),
    "fma": (1e12, "T multiplications with addition/s in a kernel"),
}
Group = Mapping[str, Any]


def markdown(payload: Mapping[str, Any]) -> str:
    """The whole report."""
    device = payload["device"]
    parts = [
        f"# GPU benchmarks on {device.get('name', 'an unknown card')}",
        common.header_markdown(payload),
        "- card: "
        + ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("versions", "name")),
        "- on the card: " + ", ".join(f"{k} {v}" for k, v in device.get("versions", {}).items()),
        *common.earlier_runs(payload),
        f"{len(payload['groups'])} groups; {len(payload['missing'])} of the suite are missing. "
        f"Fingerprint of what was measured: {payload['fingerprint']}.",
        "Times are medians of the device's own time (CUDA events, L2 overwritten before each call, "
        "lines by turns), forward and pure backward apart; ratios are over unbiased flash "
        "attention of the same run (causal over causal; float32 over PyTorch's "
        "memory-efficient kernel). Errors are against float64 on sampled rows, over the largest "
        "entry: output / gradients. `=` after a line: two runs had the same bits.",
        "## Goals",
        goals(payload["goals"]),
        "## What the card can do, measured in the last run",
        common.markdown_table(
            ["rate", "measured"],
            [
                [UNITS[name][1], f"{value / UNITS[name][0]:.2f}"]
                for name, value in payload["ceilings"].items()
            ],
        ),
    ]
    for name in SCRIPTS:
        found = {k: g for k, g in payload["groups"].items() if k.startswith(f"{name}/")}
        if found:
            title = (script(name).__doc__ or "").splitlines()[0]
            parts += [f"## {title}", *(one(key, group) for key, group in found.items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def goals(found: Sequence[Mapping[str, Any]]) -> str:
    """The verdicts, and under the table every cell that falls short with its reason."""
    rows, short = [], []
    for one in found:
        values = [cell["value"] for cell in one["cells"] if cell["value"] is not None]
        worst = "-"
        if values:
            worst = f"{(min if one['at_least'] else max)(values):.2f}"
        limit = f"{'at least' if one['at_least'] else 'at most'} {one['limit']:g}"
        met = f"{one['met']} of {len(one['cells'])}"
        rows.append([f"{one['script']}: {one['goal']}", limit, met, worst, one["verdict"]])
        short += [
            f"- {cell['key']}: {one['goal']}: {'-' if cell['value'] is None else cell['value']} "
            f"(goal {limit}){': ' + cell['why'] if cell['why'] else ''}"
            for cell in one["cells"]
            if not cell["met"]
        ]
    table = common.markdown_table(["goal", "limit", "cells that meet it", "worst", "verdict"], rows)
    return table + ("\n\nWhat falls short:\n\n" + "\n".join(short) if short else "")


def one(key: str, group: Group) -> str:
    """The table of a group."""
    head = f"### {key}"
    if group["status"] != "ok":
        return f"{head}\n\n{group['status']}: {group.get('reason', '')}"
    columns = [
        "line",
        "forward ms",
        "ratio",
        "backward ms",
        "ratio",
        "both",
        "call ms",
        "MB",
        "error",
    ]
    rows = [[name, *cells(cell)] for name, cell in group["lines"].items()]
    parts = [head, common.markdown_table(columns, rows), reached(group)]
    if "ratios" in group:
        said = {"faster": "times faster than the best stock way", "over_bare": "times the time "
                "with the bias removed"}  # fmt: skip
        parts.append(
            "; ".join(f"{value:.2f} {said[name]}" for name, value in group["ratios"].items())
        )
    if "bias_left_out" in group:
        parts.append(f"Leaving the bias out moves the output by {group['bias_left_out']:.1e}.")
    return "\n\n".join(part for part in parts if part)


def cells(cell: Group) -> list[str]:
    """The columns of a line: times, ratios, memory and error, or why there are none."""
    if cell["status"] != "ok":
        return [f"{cell['status']}: {cell.get('reason', '')[:120]}", *[""] * 7]
    ratio = cell.get("ratio", {})
    made = []
    for part in ("forward", "backward"):
        timing = cell.get(part)
        made.append("" if timing is None else f"{1e3 * timing['median_s']:.3f}")
        made.append(_number(ratio.get(part)))
    both = cell.get("both")  # whole models are timed in one piece
    made.append(_number(ratio.get("both")) if both is None else f"{1e3 * both['median_s']:.3f} ms")
    wall = cell.get("wall_both_s", cell.get("wall_forward_s"))
    made.append("" if wall is None else f"{1e3 * wall:.3f}")
    memory = cell.get("memory_both") or cell.get("memory_forward")
    made.append("" if memory is None else f"{memory / 1e6:.0f}")
    made.append(_error(cell))
    return made


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _error(cell: Group) -> str:
    found = dict(cell.get("error", {}))
    if not found:
        return ""
    parts = [f"{found.pop('output'):.0e}"] if "output" in found else []
    if found:
        parts.append(f"{max(found.values()):.0e}")
    same = cell.get("repeats")
    mark = "" if same is None else " =" if all(same.values()) else " differs"
    return " / ".join(parts) + mark


def reached(group: Group) -> str:
    """What bounds our line and flash at the card's rates, and how near to that they came."""
    said = []
    for name, passes in group.get("floors", {}).items():
        for part, floor in passes.items():
            timing = group["lines"].get(name, {}).get(part)
            if timing is None or not floor["bound"]:
                continue
            amounts = ", ".join(f"{what} {1e3 * s:.3f}" for what, s in floor["seconds"].items())
            share = 100 * floor["floor_s"] / timing["median_s"]
            said.append(
                f"- {name}, {part}: at the card's rates {amounts} ms; bound by {floor['bound']}, "
                f"reached {share:.0f} % of that"
            )
    return "\n".join(said)
