"""The tables of `docs/models/*.md`, from the recorded grids.

python docs/make_models.py

A page names a grid between two marker lines; what stands between them is made here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script from anywhere

PAGES = ROOT / "docs" / "models"
RESULTS = ROOT / "experiments" / "results" / "models"
BLOCK = re.compile(
    r"(<!-- results: (?P<name>[\w-]+) -->\n).*?(<!-- end of results -->)", flags=re.DOTALL
)

GRIDS = re.compile(r"(<!-- grids -->\n).*?(<!-- end of grids -->)", flags=re.DOTALL)


def number(value: float | None) -> str:
    """Four digits, and a thousand times as many where that is plainer."""
    if value is None:
        return "-"
    return f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"


def span(found: Mapping[str, Any]) -> str:
    """A mean with its interval."""
    if found["low"] is None or found["low"] == found["high"]:  # a number without chance in it
        return number(found["mean"])
    return f"{number(found['mean'])} [{number(found['low'])}, {number(found['high'])}]"


def table(result: Mapping[str, Any]) -> str:
    """What a grid found, as Markdown."""
    seeds = ", ".join(str(seed) for seed in result["seeds"])
    lines = [
        "",
        f"{result['question']} Data: {result['data']}",
        "",
        f"`{result['command']}`; seeds {seeds}; {len(result['search'])} "
        f"setting{'s' if len(result['search']) > 1 else ''} tried for every variant alike; "
        f"{result['environment']['machine']['cpu']}, {result['seconds'] / 60:.0f} minutes in all; "
        f"commit {result['commit'][:7]}."
        + ("" if result["complete"] else " **Not complete yet: what is missing is left out.**"),
        "",
        "| claim | gain over the control, 95 % interval | seeds | |",
        "|---|---|---|---|",
    ]
    for claim in result["claims"]:
        gain = claim["gain"]
        known = gain["count"] >= len(result["seeds"])
        word = ("holds" if claim["holds"] else "**does not hold**") if known else "not measured"
        what = f"{claim['claim']} ({claim['better']} beside {claim['control']}, {claim['number']})"
        lines.append(f"| {what} | {span(gain)} | {gain['count']} | {word} |")
    names = sorted(
        {n for v in result["means"].values() for n in v if n not in ("setting", "seeds")}
        - {"validation"}
    )
    if names:
        lines += ["", "| variant | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
        for variant, means in result["means"].items():
            cells = [span(means[name]) if name in means else "-" for name in names]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    if result["note"]:
        lines += ["", result["note"]]
    return "\n".join([*lines, "", ""])


def grids(pages: Mapping[str, str], results: Path = RESULTS) -> str:
    """Every grid that a page shows, by its question and how many of its claims hold."""
    lines = ["", "| page | question | claims that hold |", "|---|---|---|"]
    for name, text in pages.items():
        title = text.partition("\n")[0].removeprefix("# ")
        for block in BLOCK.finditer(text):
            path = results / f"{block['name']}.json"
            if not path.exists():
                continue
            result = json.loads(path.read_text(encoding="utf-8"))
            claims = result["claims"]
            held = f"{sum(claim['holds'] for claim in claims)} of {len(claims)}"
            if not claims:
                held = "see there"
            if not result["complete"]:
                held = "not measured whole"
            lines.append(f"| [{title}]({name}) | {result['question']} | {held} |")
    return "\n".join([*lines, "", ""])


def page(text: str, results: Path = RESULTS) -> str:
    """A page with its tables made anew."""

    def made(block: re.Match[str]) -> str:
        path = results / f"{block['name']}.json"
        if not path.exists():
            return f"{block[1]}\nNot measured yet.\n\n{block[3]}"
        result = json.loads(path.read_text(encoding="utf-8"))
        return f"{block[1]}{table(result)}{block[3]}"

    return BLOCK.sub(made, text)


def outputs() -> dict[Path, str]:
    """Every page and what it has to say."""
    found = {path: page(path.read_text(encoding="utf-8")) for path in sorted(PAGES.glob("*.md"))}
    table = grids({path.name: text for path, text in found.items()})
    return {
        path: GRIDS.sub(lambda block: f"{block[1]}{table}{block[2]}", text)
        for path, text in found.items()
    }


if __name__ == "__main__":
    for place, text in outputs().items():
        place.write_text(text, encoding="utf-8")
        print(f"wrote {place.relative_to(ROOT)}")
