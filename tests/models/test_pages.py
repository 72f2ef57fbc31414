"""Pages of the models: their tables are those of the recorded results, and each has its parts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from experiments.grid import Claim, Grid
from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs" / "models").glob("*.md"))


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "make_models.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_current(make: ModuleType) -> None:
    outputs = make.outputs()
    assert set(outputs) == set(PAGES)
    for path, text in outputs.items():
        assert path.read_text(encoding="utf-8") == text, "run python docs/make_models.py"


@pytest.mark.parametrize("path", [p for p in PAGES if p.stem != "index"], ids=lambda p: p.stem)
def test_a_page_has_its_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "attnbias-models" in text  # the command
    assert "```python" in text  # on your own data
    assert any(word in text for word in ("## Price", "## What it costs", "A training of")), "price"
    assert "](../images/models/" in text  # a picture
    assert "<!-- results: " in text  # what held and what did not


def test_every_recorded_grid_is_on_a_page() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    for path in sorted((ROOT / "experiments" / "results" / "models").glob("*.json")):
        if "claims" in json.loads(path.read_text(encoding="utf-8")):
            assert f"<!-- results: {path.stem} -->" in text, path.stem


def test_a_claim_that_does_not_hold_is_said(make: ModuleType, tmp_path: Path) -> None:
    grid = Grid(
        name="toy",
        work="none",
        question="Is it?",
        data="none.",
        variants=("a", "b"),
        measure=lambda variant, setting, seed: {"error": seed + (variant == "a")},
        claims=(
            Claim("a is better", "error", "a", "b"),
            Claim("b is", "error", "b", "a", margin=0.5),
        ),
    )
    grid.run(path=tmp_path / "toy.json")
    text = make.page("x\n<!-- results: toy -->\nstale\n<!-- end of results -->\ny", tmp_path)
    assert "stale" not in text
    assert "a is better (a beside b, error) | -1 | 3 | **does not hold** |" in text
    assert "b is (b beside a, error) | 1 | 3 | holds |" in text
    assert make.page(text, tmp_path) == text
    listed = make.grids({"toy.md": f"# Toys\n{text}", "none.md": "# None"}, tmp_path)
    assert "| [Toys](toy.md) | Is it? | 1 of 2 |" in listed
    assert "Not measured yet." in make.page(text, tmp_path / "nowhere")
