"""The numbers in the README and the docs are those of the recorded results."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import prices, readme
from benchmarks.structure_kinds import STRUCTURES


def test_the_readme_says_what_was_measured() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run `python -m benchmarks.readme`"
    assert "not measured" not in readme.table()


def test_the_docs_say_what_was_measured() -> None:
    for page in prices.pages():
        text = page.read_text(encoding="utf-8")
        assert prices.filled(text) == text, f"{page.name}: run `python -m benchmarks.readme`"


def test_every_structure_that_is_timed_has_its_price_on_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in prices.pages())
    lines = {line for found in prices.BLOCK.findall(text) for line in found[2].split("; ")}
    assert {structure.name for structure in STRUCTURES} <= lines


def test_a_price_is_read_from_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    ok = {"status": "ok", "ratio": 1.234, "lowering": "fold"}
    groups = {"float32/d64/full/forward/2048": {"lines": {"low rank 8": ok}}}
    head: dict[str, Any] = {"machine": {"cpu": "C", "cores": 2}, "versions": {"torch": "2"}}
    row = {"extra_mb": 7.4}
    memory = {"groups": [{"direction": "learn", "queries": 8192, "lines": {"low rank 8": row}}]}
    results = {"structures": head | {"groups": groups}, "memory_structures": memory}
    monkeypatch.setattr(prices, "recorded", results.get)
    said = prices.filled("<!-- price: low rank 8; grid 2-D -->\nstale\n<!-- end of price -->")
    assert "| forward |  | 1.23 `fold` |" in said
    assert "7 MB at 8,192 (training, learned parameters)" in said
    assert "grid 2-D: not measured" in said
    assert "stale" not in said
    assert prices.filled(said) == said


def test_what_steering_costs() -> None:
    times = {"prefill, attention": 1.1, "prefill, model": 1.04, "token, model": 1.2}
    lines = {
        "plain, fused": {"status": "ok", "moved": 0.0, **times},
        "KeyShift": {"status": "ok", "moved": 0.5, **times},
        "broken": {"status": "failed"},
    }
    found = {"groups": {"4096": {"lines": lines}}, "goals": [{"holds": True}, {"holds": False}]}
    text = readme._steered(found)
    assert "KeyShift 1.10 / 1.04 / 1.20; broken failed." in text
    assert "1 of 2 goals hold" in text
    assert "plain" not in text.split("hold)")[1]
    assert "not measured" in readme._steered({"groups": {}, "goals": []})
