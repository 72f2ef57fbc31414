"""The pages of rules, `docs/rules/*.md` and their index, from docstrings, catalogue and results.

python docs/make_rules.py
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # so that it runs as a script from anywhere

import attnbias as ab  # noqa: E402
from attnbias.catalogue import works  # noqa: E402
from attnbias.protocols import KINDS, PROTOCOLS  # noqa: E402
from attnbias.steer import Rule  # noqa: E402
from benchmarks.steer_lines import GOALS, LINES, NO_GOAL  # noqa: E402
from docs.make_forms import _named, paragraphs, plain, starting  # noqa: E402

FOLDER = ROOT / "docs" / "rules"
PRICES = ROOT / "benchmarks" / "results" / "steer.json"
PRICED_AT = "4096"
COMMON = {f.name for f in fields(Rule)}
HOOKS = {
    "vectors": "queries, keys and values",
    "bias": "a bias on the scores",
    "reallocate": "shares of groups of keys",
    "outputs": "head outputs",
    "hidden": "hidden states",
    "tokens": "tokens added or dropped",
    "logits": "next-token scores",
    "branches": "a second forward beside the main one",
    "decode": "the loop of `generate`",
    "prepare": "a measurement of each prompt",
    "wire": "the order of a UNet block's parts",
}
SECTIONS = ("Args:", "Attributes:", "Cost:", "Raises:", "Source:")
HEAD = "<!-- made by `python docs/make_rules.py` -->\n"


def rules() -> dict[str, type[Rule]]:
    """Every rule of the shelf, by name."""
    found = {name: getattr(ab.rules, name) for name in ab.rules.__all__}
    kept = {
        name: one
        for name, one in found.items()
        if inspect.isclass(one) and issubclass(one, Rule) and one is not Rule
    }
    return dict(sorted(kept.items(), key=lambda item: item[0].lower()))


def file_name(name: str) -> str:
    """The file of a rule's page, named as its module."""
    return str(getattr(ab.rules, name).__module__).rpartition(".")[2] + ".md"


def hooks(rule: type[Rule]) -> list[str]:
    """The hooks that the class implements."""
    return [
        name
        for name in HOOKS
        if getattr(rule, name, None) is not None
        and getattr(rule, name) is not getattr(Rule, name, None)
    ]


def work_of(name: str) -> Any:
    """The catalogue row that lists the rule, or None."""
    return next((row for row in works() if f"attnbias.rules.{name}" in row.objects), None)


def supply(rule: type[Rule]) -> list[str]:
    """What the user must give: fields without a default, spans, a fit, a prompt."""
    made = []
    needed = [
        f.name
        for f in fields(rule)
        if f.init and f.default is MISSING and f.default_factory is MISSING
    ]
    for name in needed:
        made.append('`heads`: `"all"` must be typed' if name == "heads" else f"`{name}`")
    given = _spans(rule)
    if given:
        made.append("spans, unless other names are given: " + ", ".join(f'"{s}"' for s in given))
    for name, what in (("fit", "a fit"), ("measure", "a measurement"), ("prepare", "the prompt")):
        function = getattr(rule, name, None)
        if function is None or function is getattr(Rule, name, None):
            continue
        first = plain(paragraphs(function)[0]) if function.__doc__ else ""
        if name == "prepare":
            made.append("the prompt: `ab.steer(model, rule, prompt=ab.prompt(...))`")
        else:
            arguments = [p for p in inspect.signature(function).parameters if p != "self"]
            called = ", ".join(a for a in arguments if a in _required(function))
            made.append(f"{what}: `rule.{name}({called})`. {first}".strip())
    return made


def _required(function: Any) -> set[str]:
    return {
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is inspect.Parameter.empty and p.kind is not p.VAR_KEYWORD
    }


def _spans(rule: type[Rule]) -> list[str]:
    """Spans named by the defaults of the rule's own fields."""
    found: list[str] = []
    for field in fields(rule):
        value = field.default
        if field.name in COMMON or not isinstance(value, tuple):
            continue
        found += [one for one in value if isinstance(one, str) and one != "first"]
    return list(dict.fromkeys(found))


def prices() -> dict[str, Any]:
    """The recorded cells at one length, and the header of their file; {} where none is there."""
    if not PRICES.is_file():
        return {}
    found: dict[str, Any] = json.loads(PRICES.read_text(encoding="utf-8"))
    group = found["groups"].get(PRICED_AT)
    return {} if group is None else {"head": found, "lines": group["lines"]}


def price(name: str, recorded: dict[str, Any]) -> str:
    """The measured price of a rule, or that there is none."""
    line = next((one for one in LINES if one.prices == name), None)
    if line is None:
        return "No line of the benchmark; see the cost in the docstring."
    cell = recorded.get("lines", {}).get(line.name)
    if cell is None:
        return "Not recorded yet: `python -m benchmarks.steer`."
    if cell["status"] != "ok":
        return f"{line.name}: {cell['status']}, {cell['reason']}."
    limit = GOALS[line.goal] if line.goal != NO_GOAL else None
    times = ", ".join(f"{what} {cell[f'prefill, {what}']:.2f}" for what in ("model", "attention"))
    goal = f" (goal {limit})" if limit else ""
    return (
        f"{line.name}, at {int(PRICED_AT):,} tokens over the plain fused model: time of a prefill, "
        f"{times}; of a decoded token, model {cell['token, model']:.2f}{goal}. "
        f"{recorded['head']['machine']['cpu']}; every length and the eager rewrite: "
        "`benchmarks/results/steer.md`."
    )


def evidence(row: Any) -> list[str]:
    """What speaks for the rule: tests, and results with their numbers and verdict."""
    made = []
    for path in row.evidence:
        if not path.endswith(".json"):
            made.append(f"`{path}`")
            continue
        file = ROOT / path
        if not file.is_file():
            made.append(f"`{path}`: not recorded yet")
            continue
        found = json.loads(file.read_text(encoding="utf-8"))
        if "gain" not in found or not isinstance(found["gain"], (int, float)):
            made.append(f"`{path}`")
            continue
        word = "holds" if found["passed"] else "**does not hold**"
        made.append(
            f"{word} over {len(found['seeds'])} seeds: gain over the control {found['gain']:.3g} ± "
            f"{found['error']:.2g}. Claim: {plain(found['claim'])} Control: "
            f"{plain(found['control'])} (`{path}`, `{found['command']}`)"
        )
    return made


def body(parts: list[str]) -> list[str]:
    """What a docstring says between its first line and its sections, formulas where they stand."""
    made: list[str] = []
    rest = list(parts)
    while rest:
        part = rest.pop(0)
        if part.startswith(SECTIONS):
            continue
        if not part.lstrip().startswith(".. math::"):
            made.append(plain(part))
            continue
        formula = part.split("::", 1)[1]
        if not formula.strip() and rest:
            formula = rest.pop(0)
        lines = [line.strip() for line in formula.splitlines() if line.strip()]
        made.append("```tex\n" + "\n".join(lines) + "\n```")
    return made


def page(name: str, rule: type[Rule], recorded: dict[str, Any]) -> str:
    """One rule."""
    parts = paragraphs(rule)
    row = work_of(name)
    blocks = [f"# {name}", plain(parts[0])]
    if row is not None:
        number = f", arXiv {row.arxiv}" if row.arxiv else ""
        blocks.append(
            f"{row.title} ({row.year}{number}). Marks: {', '.join(row.marks) or 'none yet'}."
        )
    blocks += body(parts[1:])
    edits = ", ".join(HOOKS[hook] for hook in hooks(rule))
    if edits:
        blocks.append(f"Edits: {edits}.")
    blocks.append("## What you must supply")
    blocks.append("\n".join(f"- {one}" for one in supply(rule)) or "Nothing.")
    entries = [part for part in parts if part.startswith("Args:")]
    if entries:
        listed = inspect.cleandoc(entries[0].split("\n", 1)[1])
        blocks.append("## Arguments")
        blocks.append(
            "\n".join(f"- {plain(_named(entry))}" for entry in re.split(r"\n(?=\S)", listed))
        )
    blocks.append("## Price")
    if cost := starting(parts, "Cost:"):
        said = plain(cost)
        blocks.append(said[:1].upper() + said[1:])
    blocks.append(price(name, recorded))
    blocks.append("## Evidence")
    if row is None:
        blocks.append("No work of the catalogue lists it; its tests are in `tests/steer/`.")
    else:
        blocks.append("\n".join(f"- {one}" for one in evidence(row)))
        if row.id in PROTOCOLS:
            one = PROTOCOLS[row.id]
            blocks.append(
                f"On the work's own kind of model and data (a line: {KINDS[one.kind].says}):\n\n"
                f"```bash\nattnbias reproduce {row.id} --model MODEL --data FILE.jsonl\n```"
            )
    blocks.append("## Source")
    if row is not None:
        blocks.append(f"Read: {row.source}.")
    blocks.append(plain(starting(parts, "Source:") or "None."))
    if row is not None and row.note:
        blocks.append(plain(row.note))
    return HEAD + "\n" + "\n\n".join(blocks) + "\n"


def index(found: dict[str, type[Rule]]) -> str:
    """All rules in a table."""
    lines = ["| rule | what it does | edits | read | marks |", "|---|---|---|---|---|"]
    for name, rule in found.items():
        row = work_of(name)
        edits = ", ".join(f"`{hook}`" for hook in hooks(rule))
        read, marks = (row.source, ", ".join(row.marks)) if row is not None else ("", "")
        first = plain(paragraphs(rule)[0])
        lines.append(f"| [{name}]({file_name(name)}) | {first} | {edits} | {read} | {marks} |")
    text = (
        "A rule shifts the attention (or the states, the tokens, the scores) of a trained model "
        "while a `with ab.steer(...)` block runs; [Shifting](../steer.md) says how. Each page has "
        "the rule's equation, its source and how closely it was read, what you must supply, its "
        "price and the evidence. *Marks* are computed from test and result files: an "
        "implemented rule passes the inherited test case, a shown one has its effect on our data "
        "beyond a control."
    )
    return HEAD + "\n# Rules\n\n" + text + "\n\n" + "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every file of `docs/rules/` by name."""
    found, recorded = rules(), prices()
    made = {file_name(name): page(name, rule, recorded) for name, rule in found.items()}
    return {"index.md": index(found), **made}


def navigation(text: str) -> str:
    """`mkdocs.yml` with the pages of rules under "Rules"."""
    begin, end = "  - Rules:\n", "  - Command line:"
    head, rest = (text.split(begin) if begin in text else text.split(end))[:2]
    tail = rest.partition(end)[2] if begin in text else rest
    lines = ["      - All of them: rules/index.md"]
    lines += [f"      - {name}: rules/{file_name(name)}" for name in rules()]
    return head + begin + "\n".join(lines) + "\n" + end + tail


def write(folder: Path, made: dict[str, str], navigation: Callable[[str], str]) -> None:
    """Write pages and the navigation; pages of what is gone are removed."""
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.md"):
        if old.name not in made:
            old.unlink()
    for name, text in made.items():
        (folder / name).write_text(text, encoding="utf-8")
    nav = ROOT / "mkdocs.yml"
    nav.write_text(navigation(nav.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    write(FOLDER, pages(), navigation)
