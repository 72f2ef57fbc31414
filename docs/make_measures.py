"""The pages of measures and statistics, from docstrings, catalogue and results.

python docs/make_measures.py
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script from anywhere

import attnbias as ab  # noqa: E402
from attnbias.catalogue import works  # noqa: E402
from attnbias.measures import Measure  # noqa: E402
from attnbias.observe.statistics import BUILTIN  # noqa: E402
from docs.make_forms import _named, paragraphs, plain, starting  # noqa: E402
from docs.make_rules import body, evidence, write  # noqa: E402

FOLDER = ROOT / "docs" / "measures"
STATISTICS = "statistics.md"
HEAD = "<!-- made by `python docs/make_measures.py` -->\n"


def measures() -> dict[str, type[Measure]]:
    """Every measure that can be made, by name."""
    found = {name: getattr(ab.measures, name) for name in ab.measures.__all__}
    kept = {
        name: one
        for name, one in found.items()
        if inspect.isclass(one) and issubclass(one, Measure) and not inspect.isabstract(one)
    }
    return dict(sorted(kept.items(), key=lambda item: item[0].lower()))


def file_name(measure: type[Any]) -> str:
    """The file of a measure's page: its name in lower case with underscores."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", measure.__name__).lower() + ".md"


def works_of(path: str) -> list[Any]:
    """The catalogue rows that list an object."""
    return [row for row in works() if path in row.objects]


def arguments(parts: list[str]) -> str:
    """The list of arguments, "" where there is none."""
    entries = [part for part in parts if part.startswith("Args:")]
    if not entries:
        return ""
    listed = inspect.cleandoc(entries[0].split("\n", 1)[1])
    return "\n".join(f"- {plain(_named(entry))}" for entry in re.split(r"\n(?=\S)", listed))


def entry(name: str, one: type[Any], path: str, level: str) -> list[str]:
    """One object: what it computes, its arguments, its cost, evidence and source."""
    parts = paragraphs(one)
    blocks = [f"{level} {name}", plain(parts[0])]
    rows = works_of(path)
    for row in rows:
        number = f", arXiv {row.arxiv}" if row.arxiv else ""
        marks = ", ".join(row.marks) or "none yet"
        blocks.append(f"{row.title} ({row.year}{number}). Marks: {marks}.")
    blocks += body(parts[1:])
    if listed := arguments(parts):
        blocks += ["**Arguments**", listed]
    if cost := starting(parts, "Cost:"):
        blocks.append(f"**Cost:** {plain(cost)}")
    for row in rows:
        shown = [line for line in evidence(row) if "gain over" in line]
        blocks += ["**Evidence**", "\n".join(f"- {line}" for line in shown)] if shown else []
        blocks.append(f"Read: {row.source}." + (f" {plain(row.note)}" if row.note else ""))
    if source := starting(parts, "Source:"):
        blocks.append(f"**Source:** {plain(source)}")
    return blocks


def page(name: str, measure: type[Measure]) -> str:
    """One measure."""
    blocks = entry(name, measure, f"attnbias.measures.{name}", "#")
    return HEAD + "\n" + "\n\n".join(blocks) + "\n"


def statistics() -> str:
    """All statistics on one page."""
    text = (
        "A statistic is computed from each attention call of a forward that you run inside "
        "`with ab.observe(model, [...])`; [Seeing](../observe.md) says how. Where numba is "
        "installed all of them together cost about one more forward on a CPU, without a map."
    )
    blocks = ["# Statistics", text]
    for name in BUILTIN:
        path = f"attnbias.observe.statistics.{name}"
        blocks += entry(name, getattr(ab.statistics, name), path, "##")
    return HEAD + "\n" + "\n\n".join(blocks) + "\n"


def index(found: dict[str, type[Measure]]) -> str:
    """All measures in a table."""
    lines = ["| measure | what it finds | work | read | marks |", "|---|---|---|---|---|"]
    for name, one in found.items():
        rows = works_of(f"attnbias.measures.{name}")
        work = "; ".join(f"{row.title} ({row.year})" for row in rows)
        read = "; ".join(dict.fromkeys(row.source for row in rows))
        marks = "; ".join(dict.fromkeys(", ".join(row.marks) for row in rows))
        first = plain(paragraphs(one)[0])
        lines.append(f"| [{name}]({file_name(one)}) | {first} | {work} | {read} | {marks} |")
    text = (
        "A measure runs the model itself: on probe sequences of its own, with heads taken out, "
        "with gradients, over hidden states. It leaves the model as it was.\n\n"
        "```python\n"
        "scores = ab.measures.InductionHeads().measure(model)\n"
        "scores.top(5)  # (layer, head), the highest first, as a rule's heads= takes them\n"
        "```\n\n"
        "[Statistics](statistics.md) are what one attention call says. *Marks* are computed from "
        "test and result files: an implemented measure passes the inherited test case, a shown "
        "one has its effect on our data beyond a control."
    )
    return HEAD + "\n# Measures\n\n" + text + "\n\n" + "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every file of `docs/measures/` by name."""
    found = measures()
    made = {file_name(one): page(name, one) for name, one in found.items()}
    return {"index.md": index(found), STATISTICS: statistics(), **made}


def navigation(text: str) -> str:
    """`mkdocs.yml` with the pages under "Measures"."""
    begin, end = "  - Measures:\n", "  - Shifting: steer.md"
    head = text.split(begin if begin in text else end)[0]
    tail = text.partition(end)[2]
    lines = ["      - All of them: measures/index.md", "      - Statistics: measures/statistics.md"]
    lines += [f"      - {name}: measures/{file_name(one)}" for name, one in measures().items()]
    return head + begin + "\n".join(lines) + "\n" + end + tail


if __name__ == "__main__":
    write(FOLDER, pages(), navigation)
