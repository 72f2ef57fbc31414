"""The benchmark of steering measures what it says, goes on where it stopped, judges its goals."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import steer
from benchmarks.steer_lines import GOALS, LINES, NO_GOAL

FEW = ("KeyShift", "a contiguous group", "groups of each head", "a branch without the document")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few lines of a small model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1000,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
        )
        return LlamaForCausalLM(config).eval()

    lines = tuple(line for line in LINES if line.name in FEW)
    monkeypatch.setattr(steer, "LINES", lines)
    monkeypatch.setattr(steer, "model", model)


def run(out: Path, *more: str) -> dict[str, Any]:
    assert steer.main(["--only", "64", "--budget", "0.1", "--out", str(out), *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_every_line_is_measured_and_does_something(
    small: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "steer.json"
    group = run(out)["groups"]["64"]
    assert list(group["lines"]) == [steer.FLOOR, *FEW, steer.EAGER, steer.REWRITE]
    for cell in group["lines"].values():
        assert cell["status"] == "ok", cell
        for part in ("prefill", "token"):
            inside, whole = cell[f"{part}, attention ms"], cell[f"{part}, model ms"]
            assert 0 < inside < whole
    lines = group["lines"]
    assert lines[steer.FLOOR]["prefill, model"] == 1
    assert lines[steer.FLOOR]["moved"] == 0
    assert lines[steer.EAGER]["moved"] < 1e-4
    for name in (*FEW, steer.REWRITE):
        assert lines[name]["moved"] > 1e-4, name
    # The rewritten map is the library's KeyShift of 1.
    assert abs(lines["KeyShift"]["moved"] - lines[steer.REWRITE]["moved"]) < 2e-3
    text = out.with_suffix(".md").read_text()
    assert "| a contiguous group | 1.3 |" in text
    capsys.readouterr()


def test_a_rerun_measures_only_what_is_missing(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "steer.json"
    first = run(out)
    calls: list[int] = []
    real = steer.measure

    def counted(llama: Any, length: int, budget: float) -> dict[str, Any]:
        calls.append(length)
        return real(llama, length, budget)

    monkeypatch.setattr(steer, "measure", counted)
    assert run(out)["groups"] == first["groups"]
    assert calls == []
    run(out, "--fresh")
    assert calls == [64]


def test_a_line_that_fails_is_published(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr("benchmarks.steer_lines.PerHead.groups", broken)
    out = tmp_path / "steer.json"
    assert steer.main(["--only", "64", "--budget", "0.1", "--out", str(out)]) == 1
    cell = json.loads(out.read_text())["groups"]["64"]["lines"]["groups of each head"]
    assert cell == {"status": "failed", "reason": "ValueError: no such thing"}
    assert "failed: ValueError: no such thing" in out.with_suffix(".md").read_text()


def test_the_model_is_as_it_was(small: None) -> None:
    llama = steer.model()
    before = llama.config._attn_implementation
    steer.measure(llama, 64, 0.1)
    assert llama.config._attn_implementation == before


def test_goals() -> None:
    cell = {"status": "ok", "prefill, attention": 1.04, "token, model": 1.06}
    cells = {line.name: dict(cell, **{"prefill, model": 2.0}) for line in LINES}
    found = steer.verdicts([{"length": 2048, "lines": cells}, {"length": 512, "lines": cells}])
    by = {(v["line"], v["part"]): v for v in found}
    assert len(by) == len(found) == 2 * sum(line.goal != NO_GOAL for line in LINES)
    assert by["KeyShift", "prefill, attention"]["holds"] is True
    assert by["KeyShift", "token, model"]["holds"] is False
    assert by["ALFAR", "prefill, model"] == {
        "line": "ALFAR", "length": 2048, "part": "prefill, model", "limit": 2.1, "ratio": 2.0,
        "holds": True,
    }  # fmt: skip
    broken = {name: {"status": "failed"} for name in cells}
    assert not any(v["holds"] for v in steer.verdicts([{"length": 4096, "lines": broken}]))
    assert GOALS == {"bias": 1.05, "reallocate": 1.3, "per head": 2.3, "ACT": 3.2, "branch": 2.1}


def test_only_attention_is_counted() -> None:
    clock = steer.Clock()

    def slow() -> int:
        time.sleep(0.02)
        return 3

    start = time.perf_counter()
    assert clock.around(slow)() == 3
    time.sleep(0.02)
    assert 0.02 <= clock.spent <= time.perf_counter() - start - 0.02
