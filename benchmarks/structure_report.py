"""The structures grid's result: JSON, Markdown and a picture, all from the same cells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, structure_goals
from benchmarks.structure_lines import FLOOR, FLOOR_AGAIN, FLOOR_DROPOUT, PLAIN

Group = dict[str, Any]
Name = tuple[str, int, bool, str]
DIRECTION_WORDS = {
    "forward": "forward",
    "train": "training, fixed bias",
    "learn": "training, learned parameters",
    "dropout": "training with dropout 0.1, fixed bias",
    "learn, dropout": "training with dropout 0.1, learned parameters",
}
# Okabe and Ito's colours: told apart by colour-blind readers too.
COLOURS = {
    "forward": "#000000",
    "train": "#0072B2",
    "learn": "#D55E00",
    "dropout": "#009E73",
    "learn, dropout": "#CC79A7",
}


def store(
    path: Path,
    head: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Group],
    whole: Sequence[str],
) -> str:
    """Write the JSON and its Markdown beside it; returns the verdicts in words."""
    made = common.grid(head, runs, groups, whole)
    found = structure_goals.verdicts(made["groups"].values())
    payload = {**made, "goals": found}
    common.write_result(path, payload, markdown(payload))
    return "\n".join(structure_goals.words(verdict) for verdict in found)


def series_of(payload: Mapping[str, Any]) -> dict[Name, list[Group]]:
    """The groups by (dtype, dim, causal, direction), each by length."""
    series: dict[Name, list[Group]] = {}
    for group in payload["groups"].values():
        name = (group["dtype"], group["dim"], group["causal"], group["direction"])
        series.setdefault(name, []).append(group)
    places = list(DIRECTION_WORDS)

    def place(name: Name) -> tuple[Any, ...]:
        return (name[0] != "float32", name[1] != 64, name[1], name[2], places.index(name[3]))

    return {
        name: sorted(series[name], key=lambda group: group["queries"])
        for name in sorted(series, key=place)
    }


def title(name: Name) -> str:
    dtype, dim, causal, direction = name
    return (
        f"{dtype}, heads of {dim}, {'causal' if causal else 'not causal'}, "
        + (DIRECTION_WORDS[direction])
    )


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return ""
    if cell["status"] != "ok":
        return f"{cell['status']} ({cell.get('reason', '')[:80]})"
    text = f"{cell['ratio']:.2f} [{cell['ratio_low']:.2f}, {cell['ratio_high']:.2f}]"
    if "share" in cell:
        text += f", sees {100 * cell['share']:.1f} %"
    return text + (f" `{cell['lowering']}`" if "lowering" in cell else "")


def _error(cell: Mapping[str, Any] | None) -> str:
    if cell is None or cell["status"] != "ok":
        return ""
    if "error" not in cell:
        return f"unchecked ({cell['unchecked'][:60]})" if "unchecked" in cell else "-"
    parts = [f"{cell['error']:.0e}"]
    if slopes := cell.get("error_gradients"):
        inputs = [slopes[name] for name in ("query", "key", "value")]
        learned = [slope for name, slope in slopes.items() if name not in ("query", "key", "value")]
        parts.append(f"{max(inputs):.0e}")
        parts += [f"{max(learned):.0e}"] if learned else []
    left = f" ({cell['bias_left_out']:.0e})" if "bias_left_out" in cell else ""
    return " / ".join(parts) + left


def _table(groups: Sequence[Group], write: Any) -> str:
    names = list(dict.fromkeys(line for group in groups for line in group["lines"]))
    rows = [
        [name, *(write(group["lines"].get(name)) for group in groups)]
        for name in names
        if name != FLOOR and name not in FLOOR_AGAIN
    ]
    return common.markdown_table(["line", *(f"N = {g['queries']:,}" for g in groups)], rows)


def goals_table(found: Sequence[Mapping[str, Any]]) -> str:
    """The verdict on every goal; below each, the lines that make it up where there are several."""
    rows = []
    for verdict in found:
        worst = "-" if verdict["worst"] is None else f"{verdict['worst']:.2f}"
        said = "holds" if verdict["holds"] else "FALLS SHORT"
        said = said if verdict["cells"] else "not measured"
        met = f"{verdict['met']} of {verdict['cells']}"
        rows.append([verdict["goal"], f"{verdict['limit']:.2f}", met, worst, said])
        for line, own in verdict["by_line"].items() if len(verdict["by_line"]) > 1 else ():
            worst = "-" if own["worst"] is None else f"{own['worst']:.2f}"
            rows.append([f"... {line}", "", f"{own['met']} of {own['cells']}", worst, ""])
    return common.markdown_table(
        ["goal", "at most", "cells that meet it", "worst", "verdict"], rows
    )


def markdown(payload: Mapping[str, Any]) -> str:
    """The report: goals, times, errors; every cell."""
    parts = [
        "# Every structure over unbiased attention on CPU",
        common.header_markdown(payload),
        *common.earlier_runs(payload),
        "Batch 1, 8 heads. Numbers are ratios of medians over unbiased attention in the same run "
        "(causal: over causal attention), in brackets the quartiles of the ratios of single rounds "
        "(lowest and highest below five rounds), then the lowering that the planner chose. "
        f"{'The grid is whole.' if payload['complete'] else 'PARTIAL: groups are missing.'}",
        f"## Goals, at N of {structure_goals.FROM_QUERIES:,} and up",
        "A goal holds when 90 % of its cells meet it and none is above 1.5 times it; a cell that "
        "failed, was not available or is wrong meets none.",
        goals_table(payload["goals"]),
        "# Times",
    ]
    series = series_of(payload)
    for name, groups in series.items():
        floor = ", ".join(f"{1000 * g['floor_s']:.1f} ms" for g in groups)
        parts += [f"## {title(name)}", f"Unbiased attention: {floor}.", _table(groups, _cell)]
        if name[3].endswith("dropout"):
            again = []
            for group in groups:
                cell = group["lines"].get(FLOOR_DROPOUT, {"status": "missing"})
                ok = cell["status"] == "ok"
                again.append(f"{cell['ratio']:.2f}" if ok else cell["status"])
            parts.append(
                "Unbiased attention that drops weights, over unbiased attention: "
                f"{', '.join(again)}; the goals are judged over both."
            )
    parts += [
        "# Errors",
        "Largest error against float64 on the sampled rows: output / gradients of query, key and "
        "value / gradients of parameters (over their largest entry); in brackets what leaving the "
        "bias out would change in the output.",
    ]
    for name, groups in series.items():
        parts += [f"## {title(name)}", _table(groups, _error)]
    return "\n\n".join(parts) + "\n"


def draw(payload: Mapping[str, Any], folder: Path) -> bool:
    """The ratios over N, one panel for each structure (float32, heads of 64, not causal), as
    ``structures.png`` and ``.svg``; False where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    series = {
        name[3]: groups
        for name, groups in series_of(payload).items()
        if name[:3] == ("float32", 64, False)
    }
    if not series:
        return False
    lines = [
        line
        for line in dict.fromkeys(
            n for groups in series.values() for g in groups for n in g["lines"]
        )
        if not line.startswith(("unbiased", "dense mask", "window as", "table, gath"))
        and PLAIN not in line
        and "Flex" not in line
    ]
    columns = 4
    tall = -(-len(lines) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * tall), layout="constrained")
    panels = figure.subplots(tall, columns, squeeze=False, sharex=True, sharey=True).ravel()
    shown: dict[str, Any] = {}
    ticks = (0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5)
    for panel, line in zip(panels, lines, strict=False):
        panel.axhline(1.0, color="0.7", linewidth=0.8)
        rival = _points(series.get("forward", []), "dense mask")
        if rival:
            (shown["a dense mask, forward"],) = panel.plot(
                *zip(*rival, strict=True), color="0.55", linestyle=":", linewidth=1.4
            )
        for direction, groups in series.items():
            if points := _points(groups, line):
                (shown[DIRECTION_WORDS[direction]],) = panel.plot(
                    *zip(*points, strict=True),
                    marker="osD^v"[list(DIRECTION_WORDS).index(direction)],
                    markersize=3,
                    linewidth=1.2,
                    color=COLOURS[direction],
                )
        panel.set_title(line, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_ylim(0.04, 8)
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
        lengths = sorted({g["queries"] for groups in series.values() for g in groups})
        panel.set_xticks(lengths, [f"{n:,}" for n in lengths], fontsize=6, rotation=45)
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    for panel in panels[len(lines) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("time / unbiased", fontsize=8)
    figure.legend(
        handles=list(shown.values()),
        labels=list(shown),
        loc="outside lower center",
        ncols=3,
        fontsize=8,
    )
    for ending in ("png", "svg"):
        common.save_figure(figure, folder / f"structures.{ending}")
    return True


def _points(groups: Sequence[Group], line: str) -> list[tuple[int, float]]:
    return [
        (g["queries"], g["lines"][line]["ratio"])
        for g in groups
        if g["lines"].get(line, {}).get("status") == "ok" and "ratio" in g["lines"][line]
    ]
