"""The measured numbers of the README and the docs, from the results: `python -m benchmarks.readme`.

`--check` writes nothing and ends with 1 where a page says something else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import fuse_report, prices
from benchmarks.common import ROOT, markdown_table, write_text

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN = "<!-- measured: made by `python -m benchmarks.readme` -->"
END = "<!-- end of measured -->"
LENGTHS = (2048, 8192, 16384)
# (words, line, causal, backward)
LINES = (
    ("key bias", "key bias", False, False),
    ("relative bias (ALiBi, both sides)", "ALiBi", False, False),
    ("... with a dense mask in stock attention", "ALiBi, dense mask", False, False),
    ("... eager", "ALiBi, eager", False, False),
    ("... compiled FlexAttention", "ALiBi, flex", False, False),
    ("causal ALiBi, over causal attention", "ALiBi", True, False),
    ("... with a dense mask in stock attention", "ALiBi, dense mask", True, False),
    ("... eager", "ALiBi, eager", True, False),
    ("... compiled FlexAttention", "ALiBi, flex", True, False),
    ("causal ALiBi, forward and backward", "ALiBi", True, True),
    ("... with a dense mask in stock attention", "ALiBi, dense mask", True, True),
)
# (line, direction, length) of the structures grid
STRUCTURES = (
    "low rank 8",
    "grid 2-D",
    "distance, RBF 5",
    "bucketed",
    "dense pair",
    "query-relative",
    "relative + key",
    "window 256",
    "neighborhood 13x13",
)
STRUCTURE_CELLS = (("forward", 2048), ("forward", 8192), ("learn", 4096), ("learn, dropout", 4096))


def table() -> str:
    """The table and the sentences below it, in Markdown."""
    grid = _read("attention_cpu")
    memory, seen = _read("memory_cpu"), _read("observe")
    rows = []
    for words, line, causal, backward in LINES:
        cells = [_ratio(grid, line, causal, backward, n) for n in LENGTHS]
        rows.append([words, *cells])
    head = ["time over the same attention without the bias", *(f"N = {n:,}" for n in LENGTHS)]
    machine = grid["machine"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, torch {grid['versions']['torch']}, float32, "
        "8 heads of 64. Command: `python -m benchmarks.attention_cpu`; every cell, bfloat16 and "
        "the goals: [benchmarks/results/attention_cpu.md](benchmarks/results/attention_cpu.md)."
    )
    parts = [markdown_table(head, rows), "", where, "", *_structures(), _memory(memory)]
    if (RESULTS / "fuse.json").is_file():
        parts += [fuse_report.readme(_read("fuse")), ""]
    parts.append(_seen(seen))
    if (RESULTS / "steer.json").is_file():
        parts += ["", _steered(_read("steer"))]
    return "\n".join(parts).strip()


def _structures() -> list[str]:
    """The table of the other structures; nothing before they were recorded."""
    if prices.recorded("structures") is None:
        return []
    words = {"forward": "forward", "learn": "training", "learn, dropout": "training, dropout 0.1"}
    head = [f"{words[direction]}, N = {n:,}" for direction, n in STRUCTURE_CELLS]
    rows = []
    for line in (*STRUCTURES, "dense mask", "table, gathered"):
        cells = [prices.cell(line, direction, n) for direction, n in STRUCTURE_CELLS]
        if not any(cells):
            continue
        # A mask has nothing to learn: its training is the one of a fixed bias.
        cells = [
            found
            or prices.cell(line, direction.replace("learn, ", "").replace("learn", "train"), n)
            for found, (direction, n) in zip(cells, STRUCTURE_CELLS, strict=True)
        ]
        name = {
            "dense mask": "... a dense mask in stock attention, fixed",
            "table, gathered": "... a learned table gathered to a mask in stock attention",
        }.get(line, line)
        rows.append([name, *("" if c is None else _value(c) for c in cells)])
    return [
        markdown_table(["time over the same attention without the bias", *head], rows),
        "",
        "The same machine; training has gradients to the stored parameters. Command: `python -m "
        "benchmarks.structures`; every structure, the goals and the errors: "
        "[benchmarks/results/structures.md](benchmarks/results/structures.md).",
        "",
    ]


def _value(cell: dict[str, Any]) -> str:
    return f"{cell['ratio']:.2f}" if cell["status"] == "ok" else str(cell["status"])


def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _ratio(grid: dict[str, Any], line: str, causal: bool, backward: bool, n: int) -> str:
    mask, passes = "causal" if causal else "full", "forward+backward" if backward else "forward"
    group = grid["groups"].get(f"float32/{mask}/{passes}/{n}")
    cell = None if group is None else group["lines"].get(line)
    if cell is None:
        return "not measured"
    return f"{cell['ratio']:.2f}" if cell["status"] == "ok" else str(cell["status"])


def _memory(found: dict[str, Any]) -> str:
    parts = [
        f"{name} {row['extra_mb']:.0f} MB"
        for group in found["groups"]
        for name, row in group["lines"].items()
        if group["queries"] == 32768 and name != row["floor"]
    ]
    return (
        "Peak memory over the same process with unbiased attention, at 32,768 tokens "
        f"(`python -m benchmarks.memory_cpu`): {', '.join(parts)}.\n"
    )


def _seen(found: dict[str, Any]) -> str:
    parts = [
        f"{name}{', causal' if group['causal'] else ''} {row['ratio']:.2f}"
        for group in found["groups"]
        for name, row in group["lines"].items()
        if (group["part"], group["tokens"]) == ("site", 8192) and name != "forward"
    ]
    return (
        "Seeing, forward included, over the forward alone at 8,192 tokens "
        f"(`python -m benchmarks.observe`): {'; '.join(parts)}."
    )


def _steered(found: dict[str, Any]) -> str:
    """Prefill (attention's time, the model's) and a token, at 4,096 tokens."""
    group = found["groups"].get("4096")
    if group is None:
        return "Steering: not measured at 4,096 tokens."
    parts = []
    for name, cell in group["lines"].items():
        if cell["status"] != "ok":
            parts.append(f"{name} {cell['status']}")
        elif cell["moved"]:
            times = [cell[k] for k in ("prefill, attention", "prefill, model", "token, model")]
            parts.append(f"{name} " + " / ".join(f"{one:.2f}" for one in times))
    kept = sum(goal["holds"] for goal in found["goals"])
    return (
        "Steering over the plain fused model at 4,096 tokens, as attention in a prefill / the "
        "model in a prefill / the model for a decoded token (`python -m benchmarks.steer`; "
        f"{kept} of {len(found['goals'])} goals hold): {'; '.join(parts)}."
    )


def filled(text: str) -> str:
    """The README with the table of today's results between its marks."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def main(arguments: Sequence[str]) -> int:
    made = {README: filled(README.read_text(encoding="utf-8"))}
    made |= {page: prices.filled(page.read_text(encoding="utf-8")) for page in prices.pages()}
    stale = [page for page, text in made.items() if page.read_text(encoding="utf-8") != text]
    if "--check" in arguments:
        return int(bool(stale))
    for page in stale:
        write_text(page, made[page])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
