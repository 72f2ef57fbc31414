"""The report of `benchmarks.fuse`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks import common
from benchmarks.fuse_grid import BARE, FUSED, LINES, STOCK, Cell, verdicts

KINDS = {"forward": "", "training": ", training step", "token": ", decoded tokens"}


def payload(grid: Mapping[str, Any], cells: tuple[Cell, ...]) -> dict[str, Any]:
    """The result file: the grid and what became of the goals."""
    return {**grid, "goals": verdicts(grid["groups"], cells)}


def seconds(value: float) -> str:
    """Seconds with three digits: `0.0123`, `1.23`, `12.3`."""
    return f"{value:.4f}" if value < 0.1 else f"{value:.3f}" if value < 1 else f"{value:.3g}"


def _time(cell: dict[str, Any]) -> str:
    if cell["status"] != "ok" or "median_s" not in cell:
        return str(cell["status"])
    return seconds(cell["median_s"])


def _range(ratios: dict[str, float], name: str) -> str:
    if name not in ratios:
        return ""
    words = f"{ratios[name]:.2f}"
    if f"{name}_low" in ratios:
        words += f" ({ratios[f'{name}_low']:.2f} to {ratios[f'{name}_high']:.2f})"
    return words


def _error(ratios: dict[str, float], name: str) -> str:
    return f"{ratios[name]:.0e}" if name in ratios else ""


def time_rows(groups: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for group in groups:
        what = f"{group['size']:,} {group.get('unit', '')}{KINDS[group['kind']]}"
        if group["status"] != "ok":
            rows.append([what, f"{group['status']}: {group['reason']}", *[""] * 6])
            continue
        lines, ratios = group["lines"], group["ratios"]
        stock = _time(lines[STOCK])
        if "variant" in lines[STOCK]:
            stock += f" ({lines[STOCK]['variant']})"
        way = ", ".join(lines[FUSED].get("lowering", [])) or lines[FUSED].get("reason", "")
        rows.append(
            [
                what,
                stock,
                _time(lines[FUSED]),
                _time(lines[BARE]),
                _range(ratios, "faster"),
                _range(ratios, "over_bare"),
                _error(ratios, "difference"),
                way,
            ]
        )
    return rows


def more_lines(groups: list[dict[str, Any]]) -> str:
    """Other ways to fuse, which only approximate."""
    found = []
    for group in groups:
        for name, cell in group.get("lines", {}).items():
            if name in LINES:
                continue
            words = f"- {group['size']:,} {group['unit']}, {name}: "
            if "faster" in cell:
                words += (
                    f"{_time(cell)} s, {cell['faster']:.2f} times faster than stock, difference "
                    f"{cell['difference']:.0e} on random weights"
                )
            else:
                words += f"{cell['status']}: {cell.get('reason', '')}"
            found.append(words)
    return "\n".join(found)


def memory_rows(groups: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    for group in groups:
        what = f"{group['size']:,} {group.get('unit', '')}{KINDS[group['kind'].split()[-1]]}"
        if group["status"] != "ok":
            rows.append([what, f"{group['status']}: {group['reason']}", *[""] * 5])
            continue
        lines, ratios = group["lines"], group["ratios"]
        cells = [
            f"{lines[line]['peak'] / 1e9:.2f}"
            if lines[line]["status"] == "ok"
            else f"{lines[line]['status']}: {lines[line]['reason']}"
            for line in LINES
        ]
        extra = [
            f"{ratios[name]:,.0f}" if name in ratios else ""
            for name in ("stock_extra_mb", "extra_mb")
        ]
        part = f"{ratios['memory']:.2f}" if "memory" in ratios else ""
        rows.append([what, *cells, part, *extra])
    return rows


def goal_rows(goals: list[dict[str, Any]]) -> list[str]:
    """The goals that fall short, and in a line how many of each hold."""
    found = []
    for words in dict.fromkeys(goal["words"] for goal in goals):
        same = [goal for goal in goals if goal["words"] == words]
        found.append(f"- {words}: {sum(goal['holds'] for goal in same)} of {len(same)} hold")
        for goal in same:
            if not goal["holds"]:
                bound = "at least" if goal["least"] else "at most"
                value = "not measured" if goal["value"] is None else f"{goal['value']:.3g}"
                found.append(
                    f"  - FALLS SHORT: {goal['cell']}: {value}, goal {bound} {goal['limit']:g}"
                )
    return found


# (subject, kind, size) of the table in the README
README: tuple[tuple[str, str, int], ...] = (
    ("T5", "forward", 512),
    ("T5", "forward", 2048),
    ("T5", "forward", 8192),
    ("T5, training", "training", 4096),
    ("MPT", "forward", 4096),
    ("Bloom", "forward", 4096),
    ("Falcon", "forward", 4096),
    ("gpt-oss", "forward", 4096),
    ("LongT5", "forward", 16384),
    ("LayoutLMv3", "forward", 2048),
    ("Swin", "forward", 1024),
    ("Swin v2", "forward", 1024),
    ("BEiT", "forward", 1024),
    ("ESMFold", "forward", 1024),
    ("Pairformer", "forward", 1024),
)


def _peaks(groups: Mapping[str, Any], subject: str, kind: str, size: int) -> str:
    """Stock's and the fused model's memory at this size, or at the largest that was measured."""
    found = {
        group["size"]: group["lines"]
        for group in groups.values()
        if group["subject"] == subject
        and group["kind"] == f"memory {kind}"
        and group["status"] == "ok"
    }
    if not found or (size < min(found)):
        return ""
    near = size if size in found else max(found)
    peaks = [found[near][line].get("peak") for line in (STOCK, FUSED)]
    words = " / ".join(f"{one / 1e9:.2f}" if one else "none" for one in peaks)
    return words if near == size else f"{words} (at {near:,})"


def readme(result: Mapping[str, Any]) -> str:
    """The table of the README and the sentence below it."""
    groups, rows = result["groups"], []
    for subject, kind, size in README:
        group = groups.get(f"{subject}/{kind}/{size}")
        if group is None:
            continue
        what = f"{subject}, {size:,} {group['unit']}"
        if group["status"] != "ok":
            rows.append([what, group["status"], *[""] * 4])
            continue
        lines, ratios = group["lines"], group["ratios"]
        words = _peaks(groups, subject, kind, size)
        rows.append(
            [
                what,
                _time(lines[STOCK]),
                _time(lines[FUSED]),
                f"{ratios['faster']:.2f}" if "faster" in ratios else "",
                f"{ratios['over_bare']:.2f}" if "over_bare" in ratios else "",
                words,
            ]
        )
    goals = result["goals"]
    head = ["real models, fused in one call", "stock, s", "fused, s", "times faster",
            "over bias removed", "peak memory, stock / fused, GB"]  # fmt: skip
    words = (
        "Stock at its fastest attention, `ab.fuse(model)`, and the same model with its bias left "
        "out, by turns in one run; random weights, float32, batch 1; memory is the peak resident "
        f"size of a fresh process. {sum(one['holds'] for one in goals)} of {len(goals)} goals "
        "hold. Command: `python -m benchmarks.fuse`; every model and size, and what falls short: "
        "[benchmarks/results/fuse.md](benchmarks/results/fuse.md)."
    )
    return f"{common.markdown_table(head, rows)}\n\n{words}"


def markdown(result: Mapping[str, Any]) -> str:
    """The report: every model with its cells, then the goals."""
    from benchmarks.fuse_models import SUBJECTS

    parts = [
        "# Real models fused, beside stock and beside their bias removed",
        common.header_markdown(result),
        *common.earlier_runs(result),
        "Float32, random weights, tables from N(0, 1), batch 1 unless said. Seconds are medians; "
        "in brackets after a ratio the quartiles of single rounds (lowest and highest below five). "
        "Difference: the largest of the fused output (training: of the gradients) from stock, over "
        "the largest value. Memory: peak resident size of a fresh process in GB (10^9 bytes), and "
        "in MB beyond the process with the bias removed.",
    ]
    if not result["complete"]:
        parts.append(f"Not measured yet: {', '.join(result['missing'])}.")
    groups = list(result["groups"].values())
    times = ["size", "stock, s", "fused, s", "bias removed, s", "times faster than stock",
             "over bias removed", "difference", "lowering"]  # fmt: skip
    peaks = ["memory", "stock, GB", "fused, GB", "bias removed, GB", "fused / stock",
             "stock beyond removed, MB", "fused beyond removed, MB"]  # fmt: skip
    for name in dict.fromkeys(group["subject"] for group in groups):
        here = [group for group in groups if group["subject"] == name]
        words = SUBJECTS[name].words if name in SUBJECTS else "missing"
        parts.append(f"## {name}: {words}")
        timed = [group for group in here if not group["kind"].startswith("memory")]
        rest = [group for group in here if group["kind"].startswith("memory")]
        if timed:
            parts += [common.markdown_table(times, time_rows(timed)), more_lines(timed)]
        if rest:
            parts.append(common.markdown_table(peaks, memory_rows(rest)))
    goals = result["goals"]
    kept = sum(goal["holds"] for goal in goals)
    parts += [f"## Goals\n\n{kept} of {len(goals)} hold.", "\n".join(goal_rows(goals))]
    return "\n\n".join(part for part in parts if part) + "\n"
