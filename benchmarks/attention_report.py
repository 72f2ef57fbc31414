"""The attention grid's result: goals, JSON, Markdown and a picture, all from the same cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common

Group = dict[str, Any]
GOALS_FROM = 2048  # queries
FLOOR = "plain"
# A fast wrong answer meets no goal: largest error of output and gradient on the sampled rows.
ERROR_AT_MOST = {"float32": 1e-4, "bfloat16": 5e-2}


@dataclass(frozen=True)
class Goal:
    """An upper bound on a line's ratio to the floor; None = both."""

    line: str
    limit: float
    causal: bool | None
    backward: bool | None

    def covers(self, group: Mapping[str, Any]) -> bool:
        return (
            group["queries"] >= GOALS_FROM
            and self.causal in (None, group["causal"])
            and self.backward in (None, group["backward"])
        )


# Fixed before the code. Key bias is held to its goal with gradients as well.
GOALS = (
    Goal("key bias", 1.05, causal=None, backward=None),
    Goal("ALiBi", 1.07, causal=False, backward=False),
    Goal("T5 table", 1.07, causal=False, backward=False),
    Goal("ALiBi", 1.20, causal=True, backward=False),
    Goal("T5 table", 1.20, causal=True, backward=False),
    Goal("ALiBi", 1.12, causal=None, backward=True),
)


def holds(cell: Mapping[str, Any], limit: float, dtype: str) -> bool:
    """Whether a cell was measured, is right, and meets the limit."""
    if cell["status"] != "ok":
        return False
    error = max(cell["error"], cell.get("error_grad_query", 0.0))
    return bool(cell["ratio"] <= limit and error <= ERROR_AT_MOST[dtype])


def verdicts(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Every goal at every cell it covers: the limit, what was measured, whether it holds."""
    found = []
    for group in groups:
        where = {part: group[part] for part in ("dtype", "causal", "backward", "queries")}
        for goal in GOALS:
            if goal.covers(group):
                cell = group["lines"].get(goal.line, {"status": "missing"})
                found.append(
                    {
                        "line": goal.line,
                        **where,
                        "limit": goal.limit,
                        "ratio": cell.get("ratio"),
                        "error": cell.get("error"),
                        "holds": holds(cell, goal.limit, group["dtype"]),
                    }
                )
    return found


def summary(found: Sequence[Mapping[str, Any]]) -> str:
    """One line: how many goal cells hold."""
    return f"{sum(verdict['holds'] for verdict in found)} of {len(found)} cells hold"


def store(
    path: Path,
    head: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Group],
    whole: Sequence[str],
) -> str:
    """Write the JSON and its Markdown beside it; returns the goals' summary.

    `runs` are the headers of earlier runs; `whole` names the groups of the whole grid, in order.
    """
    made = common.grid(head, runs, groups, whole)
    found = verdicts(made["groups"].values())
    goals = {"from_queries": GOALS_FROM, "summary": summary(found), "cells": found}
    payload = {**made, "goals": goals}
    common.write_result(path, payload, markdown(payload))
    return summary(found)


def _series(payload: Mapping[str, Any]) -> dict[tuple[str, bool, bool], list[Group]]:
    """The groups by (dtype, backward, causal), each by length."""
    series: dict[tuple[str, bool, bool], list[Group]] = {}
    for group in payload["groups"].values():
        series.setdefault((group["dtype"], group["backward"], group["causal"]), []).append(group)
    return {
        name: sorted(members, key=lambda group: group["queries"])
        for name, members in sorted(
            series.items(), key=lambda item: (item[0][0] != "float32", item[0])
        )
    }


def _title(name: tuple[str, bool, bool]) -> str:
    dtype, backward, causal = name
    return (
        f"{dtype}, {'forward and backward' if backward else 'forward'}, "
        f"{'causal (over causal attention)' if causal else 'not causal (over plain attention)'}"
    )


def _time_cell(name: str, cell: Mapping[str, Any]) -> str:
    if cell["status"] != "ok":
        return f"{cell['status']} ({cell.get('reason', '')})"
    if name == FLOOR:
        return f"{1000 * cell['median_s']:.2f} ms"
    return f"{cell['ratio']:.3f} [{cell['ratio_low']:.2f}, {cell['ratio_high']:.2f}]"


def _lowerings(groups: Sequence[Group]) -> str:
    """Which way of computing the planner chose, and where."""
    chosen: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        for line, cell in group["lines"].items():
            if "lowering" in cell:
                chosen.setdefault((line, cell["lowering"]), []).append(f"{group['queries']:,}")
    words = [
        f"{line} `{way}` (N = {'; '.join(lengths)})" for (line, way), lengths in chosen.items()
    ]
    return "Ran as: " + ", ".join(words) + "." if words else ""


def _error_cell(cell: Mapping[str, Any]) -> str:
    if "error" not in cell:
        return str(cell["status"])
    slope = cell.get("error_grad_query")
    return f"{cell['error']:.1e}" + ("" if slope is None else f" / {slope:.1e}")


def markdown(payload: Mapping[str, Any]) -> str:
    """The report: times, goals, errors; every cell."""
    goals = payload["goals"]
    parts = [
        "# Biased over unbiased attention on CPU",
        common.header_markdown(payload),
        *common.earlier_runs(payload),
        "Batch 1, 8 heads of dimension 64. First column: the floor's median time. Others: ratio of "
        "medians over the floor, in brackets the quartiles of the ratios of single rounds (lowest "
        "and highest below five rounds). "
        f"{'The grid is whole.' if payload['complete'] else 'PARTIAL: groups are missing.'}",
    ]
    series = _series(payload)
    for name, groups in series.items():
        lines = list(groups[0]["lines"])
        rows = [
            [f"{g['queries']:,}", *(_time_cell(line, g["lines"][line]) for line in lines)]
            for g in groups
        ]
        parts += [f"## {_title(name)}", common.markdown_table(["N", *lines], rows)]
        parts += [_lowerings(groups)]
    parts += [f"## Goals, at N of {goals['from_queries']:,} and up: {goals['summary']}"]
    rows = [
        [
            c["line"],
            c["dtype"],
            "causal" if c["causal"] else "not causal",
            "forward+backward" if c["backward"] else "forward",
            f"{c['queries']:,}",
            f"{c['limit']:.2f}",
            "-" if c["ratio"] is None else f"{c['ratio']:.3f}",
            "holds" if c["holds"] else "FALLS SHORT",
        ]
        for c in goals["cells"]
    ]
    parts.append(
        common.markdown_table(
            ["line", "dtype", "mask", "direction", "N", "goal", "ratio", "verdict"], rows
        )
    )
    parts.append(
        "## Largest error against float64 on the sampled rows (output / gradient to the query)\n\n"
        "The last column is what leaving the ALiBi bias out would change in the output."
    )
    for name, groups in series.items():
        lines = list(groups[0]["lines"])
        rows = [
            [
                f"{g['queries']:,}",
                *(_error_cell(g["lines"][line]) for line in lines),
                f"{g['bias_effect']['alibi']:.1e}",
            ]
            for g in groups
        ]
        table = common.markdown_table(["N", *lines, "bias left out"], rows)
        parts += [f"### {_title(name)}", table]
    return "\n\n".join(parts) + "\n"


def draw(payload: Mapping[str, Any], path: Path) -> bool:
    """The ratios over N, one panel for each table; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    series = _series(payload)
    columns = min(4, len(series))
    tall = -(-len(series) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * tall), layout="constrained")
    ticks = (0.3, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 8)
    shown: dict[str, Any] = {}
    # A line has one colour in all panels, also where some lines are missing.
    names = list(dict.fromkeys(line for groups in series.values() for line in groups[0]["lines"]))
    panels = figure.subplots(tall, columns, squeeze=False, sharey=True).ravel()
    for panel, (name, groups) in zip(panels, series.items(), strict=False):
        for line in groups[0]["lines"]:
            points = [
                (g["queries"], g["lines"][line]["ratio"])
                for g in groups
                if g["lines"][line]["status"] == "ok"
            ]
            if points:
                peer = any(word in line for word in ("dense", "eager", "flex"))
                shown[line] = panel.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=3,
                    color=f"C{names.index(line)}",
                    linestyle="--" if peer else "-",
                    label=line,
                )[0]
        panel.set_title(_title(name), fontsize=8)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        lengths = [group["queries"] for group in groups]
        panel.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
        panel.set_xlabel("N (tokens)")
    for panel in panels[::columns]:
        panel.set_ylabel("time over unbiased attention")
    figure.legend(handles=list(shown.values()), loc="outside lower center", ncols=8, fontsize=8)
    common.save_figure(figure, path)
    return True
