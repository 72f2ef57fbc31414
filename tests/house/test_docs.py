"""The pages of structures: an example of five lines that is right, a picture of the real object."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import attnbias as ab
from docs import make_forms, make_measures, make_rules, pictures
from tests.conftest import ROOT

FOLDER = ROOT / "docs" / "structures"
STRUCTURES = sorted(p for p in FOLDER.glob("*.md") if p.name != "index.md")
OTHERS = [
    ROOT / "docs" / f"{name}.md" for name in ("normalisers", "dropout", "lowerings", "fitting")
]


def example(page: Path) -> str:
    found: list[str] = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), flags=re.S)
    return found[0]


def run(page: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(example(page), page.name, "exec"), names)
    return names


@pytest.mark.parametrize("page", STRUCTURES, ids=lambda p: p.stem)
def test_the_example_runs_and_is_right(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five lines; the output is softmax(q k / sqrt(d) + B) v, and not the one without B."""
    assert len([line for line in example(page).splitlines() if line]) <= 5
    names = run(page)
    q, k, v, bias = (names[name] for name in ("q", "k", "v", "bias"))
    scores = q.double() @ k.double().mT / q.shape[-1] ** 0.5
    hidden = torch.full_like(scores, -torch.inf).triu(1) if "causal=True" in example(page) else 0
    matrix = (bias.bind(q) if bias.reads_query else bias).dense()
    want = (scores + matrix + hidden).softmax(-1) @ v.double()
    assert (names["out"] - want).abs().max() < 1e-4
    assert ((scores + hidden).softmax(-1) @ v.double() - want).abs().max() > 0.05


@pytest.mark.parametrize("page", OTHERS, ids=lambda p: p.stem)
def test_the_other_examples_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run(page)
    assert names["out"].isfinite().all()
    if page.stem == "fitting":
        exact = ab.attention(*(names[n] for n in "qkv"), bias=names["bias"])
        assert (names["out"] - exact).abs().max() < 2e-3
    if page.stem == "normalisers":
        q, k, v, bias = (names[name].double() if name in "qkv" else names[name]
                         for name in ("q", "k", "v", "bias"))  # fmt: skip
        scores = q @ k.mT / 8 + bias.dense()
        want = 1 / (1 + 512 * (-scores).exp()) @ v
        assert (names["out"] - want).abs().max() < 1e-4


@pytest.mark.parametrize("page", STRUCTURES, ids=lambda p: p.stem)
def test_a_page_says_what_it_must(page: Path) -> None:
    text = page.read_text("utf-8")
    for part in ("## When to use it", "## When not", "## Limits", "## Source"):
        assert part in text, part
    assert re.search(r"^    \S", text, flags=re.M), "the equation"
    assert "<!-- price: " in text or page.stem == "functions"
    (image,) = re.findall(r"!\[(.{20,})\]\(\.\./images/structures/(\w+)\.png\)", text)
    assert image[1] in pictures.PICTURES
    assert (pictures.FOLDER / f"{image[1]}.png").is_file()


def test_every_structure_has_its_page() -> None:
    said = "".join(page.read_text("utf-8") for page in STRUCTURES)
    for name in ab.__all__:
        thing = getattr(ab, name)
        if inspect.isclass(thing) and issubclass(thing, ab.Bias) and thing is not ab.Bias:
            assert f"ab.{name}(" in said, name
    index = (FOLDER / "index.md").read_text("utf-8")
    assert all(f"({page.name})" in index for page in STRUCTURES)


def test_pictures_show_the_entries(tmp_path: Path) -> None:
    assert pictures.draw("key", tmp_path).stat().st_size > 1000
    (_, shown), (_, weights) = pictures.key()
    assert (shown[0] == shown[-1]).all()
    assert torch.allclose(weights.sum(-1), torch.ones(len(weights)).double())
    for make in pictures.PICTURES.values():
        assert all(tensor.ndim == 2 and not tensor.isnan().any() for _, tensor in make())
    assert pictures.main(["no such"]) == 2


def test_the_page_of_forms_is_current() -> None:
    page = make_forms.PAGE.read_text("utf-8")
    assert page == make_forms.text(), "run `python docs/make_forms.py`"
    for name in ab.forms.__all__:
        assert f"## {name}\n" in page


def test_every_page_is_in_the_navigation() -> None:
    def pages(item: Any) -> list[str]:
        if isinstance(item, str):
            return [item]
        inside = item.values() if isinstance(item, dict) else item
        return [page for part in inside for page in pages(part)]

    nav = set(pages(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"]))
    docs = ROOT / "docs"
    assert nav == {str(page.relative_to(docs)) for page in docs.rglob("*.md")}


def test_the_pages_of_rules_are_current() -> None:
    """Also after a rule, a row of the catalogue or a recorded result has changed."""
    made = make_rules.pages()
    there = {page.name: page.read_text("utf-8") for page in make_rules.FOLDER.glob("*.md")}
    old = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    assert not old, f"{old}: run `python docs/make_rules.py`"
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert make_rules.navigation(nav) == nav, "run `python docs/make_rules.py`"


def test_a_page_of_a_rule_says_what_it_must() -> None:
    for name in make_rules.rules():
        text = (make_rules.FOLDER / make_rules.file_name(name)).read_text("utf-8")
        for part in ("## What you must supply", "## Price", "## Evidence", "## Source"):
            assert part in text, (name, part)
        assert text.count("```tex") == (inspect.getdoc(getattr(ab.rules, name)) or "").count(
            ".. math::"
        )
    page = (make_rules.FOLDER / "zero_tuning.md").read_text("utf-8")
    for words in ("2505.11739", "rule.fit(model, examples)", "`factor`", "D = 1 + (g - 1)"):
        assert words in page, words


def test_prices_on_the_pages_are_those_recorded() -> None:
    cell = {"status": "ok", "prefill, model": 1.25, "prefill, attention": 2.5, "token, model": 3.0}
    head = {"machine": {"cpu": "Abacus"}}
    recorded = {"head": head, "lines": {"ZeroTuning": cell}}
    text = make_rules.price("ZeroTuning", recorded)
    assert "model 1.25, attention 2.50; of a decoded token, model 3.00 (goal 1.05)" in text
    assert "Abacus" in text
    failed = {"head": head, "lines": {"ZeroTuning": {"status": "failed", "reason": "no"}}}
    assert make_rules.price("ZeroTuning", failed) == "ZeroTuning: failed, no."
    assert "Not recorded" in make_rules.price("ZeroTuning", {})
    assert "No line" in make_rules.price("AdaTP", {})


def test_the_pages_of_measures_are_current() -> None:
    """Also after a measure, a statistic, a row or a recorded result has changed."""
    made = make_measures.pages()
    there = {page.name: page.read_text("utf-8") for page in make_measures.FOLDER.glob("*.md")}
    old = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    assert not old, f"{old}: run `python docs/make_measures.py`"
    nav = (ROOT / "mkdocs.yml").read_text("utf-8")
    assert make_measures.navigation(nav) == nav, "run `python docs/make_measures.py`"


def test_a_page_of_a_measure_says_what_it_must() -> None:
    for name, one in make_measures.measures().items():
        text = (make_measures.FOLDER / make_measures.file_name(one)).read_text("utf-8")
        formulas = (inspect.getdoc(getattr(ab.measures, name)) or "").count(".. math::")
        assert text.count("```tex") == formulas, name
        assert "**Source:**" in text, name
        assert "**Cost:**" in text, name
    page = (make_measures.FOLDER / "induction_heads.md").read_text("utf-8")
    assert "gain over the control" in page
