"""The attention grid: its lines are right, its verdicts can fail, its file is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import attention_cpu, attention_report, common
from benchmarks.lines import LINES, dense_alibi, lines_of, timed
from benchmarks.problem import DIM, HEADS, Problem

KINDS = ("none", "key", "alibi", "t5")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_answer_equals_dense_attention_and_its_gradient(kind: str, causal: bool) -> None:
    problem = Problem(40, causal=causal)
    q, k, v = (tensor.detach().double() for tensor in problem.inputs)
    q.requires_grad_()
    bias = problem.bias_rows(kind, torch.arange(40))
    output = (q @ k.mT / DIM**0.5 + bias).softmax(-1) @ v
    (slope,) = torch.autograd.grad(output, q, problem.grad_output.double())
    answer = problem.answer(kind)
    torch.testing.assert_close(answer[0], output.detach()[0, :, problem.rows])
    torch.testing.assert_close(answer[1], slope[0, :, problem.rows])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_line_computes_what_it_says(dtype: str, causal: bool, backward: bool) -> None:
    problem = Problem(300, dtype, causal=causal, backward=backward)
    shared: dict[str, Any] = {}
    for line in LINES:
        if "flex" in line.name:
            continue  # compiles; run by the smoke test below
        result = timed(problem, line.build(problem, shared))()
        found = attention_cpu.errors(problem, result, problem.answer(line.kind))
        # A dense mask in bfloat16 is wrong by whole logits far away; softmax hides most of it.
        limit = attention_report.ERROR_AT_MOST[dtype] * (1 if line.matrices == (0, 0) else 4)
        assert max(found.values()) < limit, line.name
        if line.kind != "none":
            ignored = attention_cpu.errors(problem, result, problem.answer("none"))
            assert min(ignored.values()) > 0.2, line.name


@pytest.mark.parametrize("causal", [False, True])
def test_the_dense_mask_is_the_bias(causal: bool) -> None:
    problem = Problem(300, causal=causal)
    want = problem.bias_rows("alibi", torch.arange(300)).float()
    torch.testing.assert_close(dense_alibi(problem)[0], want, rtol=0, atol=0)


def test_a_nan_is_an_error_not_a_success() -> None:
    assert attention_cpu.gap(torch.tensor([float("nan")]), torch.zeros(1)) == 1e30


def test_what_does_not_fit_says_its_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "memory_bytes", lambda: (10**9, 10**9))
    line = next(line for line in LINES if line.name == "ALiBi, eager")
    cell = attention_cpu.too_large(line, Problem(16384))
    assert cell is not None
    assert cell["status"] == "does not fit"
    assert cell["estimate_gb"] == round(3 * HEADS * 16384**2 * 4 / 1e9, 2)
    assert attention_cpu.too_large(line, Problem(512)) is None


def group(ratio: float, **changes: Any) -> dict[str, Any]:
    """A measured group as the file holds it."""
    times = {"median_s": 1.0, "ratio_low": ratio, "ratio_high": ratio}
    cells = {line.name: {"status": "ok", "ratio": ratio, "error": 1e-7, **times} for line in LINES}
    base = {"dtype": "float32", "causal": False, "backward": False, "queries": 2048}
    return base | {"run": "1", "bias_effect": {"alibi": 2.0}, "lines": cells} | changes


def test_a_mask_held_already_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(256)
    mask = dense_alibi(problem)
    line = next(line for line in LINES if line.name == "ALiBi, dense mask")
    monkeypatch.setattr(common, "memory_bytes", lambda: (10**9, 0))
    assert attention_cpu.too_large(line, problem, {"mask": mask}) is None
    assert attention_cpu.too_large(line, problem, {}) is not None


def test_the_estimate_leaves_out_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "memory_bytes", lambda: (10**12, 10**12))
    roomy = attention_cpu.group_cost(Problem(16384), 0.01, budget=15.0)
    monkeypatch.setattr(common, "memory_bytes", lambda: (10**9, 10**9))
    assert attention_cpu.group_cost(Problem(16384), 0.01, budget=15.0) < 0.8 * roomy


def test_goals_fail_for_what_is_slow_wrong_missing_or_failed() -> None:
    def holds(found: dict[str, Any]) -> dict[str, bool]:
        return {v["line"]: v["holds"] for v in attention_report.verdicts([found])}

    assert holds(group(1.04)) == {"key bias": True, "ALiBi": True, "T5 table": True}
    assert holds(group(1.06)) == {"key bias": False, "ALiBi": True, "T5 table": True}
    assert holds(group(1.06, causal=True, backward=True))["ALiBi"]
    assert not holds(group(1.13, causal=True, backward=True))["ALiBi"]
    assert holds(group(1.19, causal=True))["ALiBi"]
    assert holds(group(9.0, queries=1024)) == {}
    assert "T5 table" not in holds(group(1.0, backward=True))
    wrong, failed, missing = group(1.0), group(1.0), group(1.0)
    wrong["lines"]["ALiBi"]["error"] = 0.5
    failed["lines"]["ALiBi"] = {"status": "failed", "reason": "x"}
    del missing["lines"]["ALiBi"]
    assert not any(holds(found)["ALiBi"] for found in (wrong, failed, missing))


def test_the_report_hides_nothing(tmp_path: Path) -> None:
    short = group(1.5)
    short["lines"]["ALiBi, eager"] = {"status": "does not fit", "reason": "estimate 99.0 GB"}
    head = common.header("m", [], seeds={}, started="1", seconds=0.0, threads=1)
    path = tmp_path / "grid.json"
    said = attention_report.store(path, head, [], {"a": short}, ["a", "b"])
    payload = json.loads(path.read_text())
    assert said == "0 of 3 cells hold"
    assert payload["missing"] == ["b"]
    assert not payload["complete"]
    words = path.with_suffix(".md").read_text()
    assert words.count("FALLS SHORT") == 3
    assert "does not fit (estimate 99.0 GB)" in words
    assert "PARTIAL" in words
    assert all(line.name in words for line in LINES)


def test_results_of_another_machine_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(common, "SCRATCH", tmp_path / "scratch")
    args = attention_cpu.parser().parse_args([])
    box = common.machine(1)
    recorded = tmp_path / "results" / "attention_cpu.json"
    assert attention_cpu.target(args, box)[0] == recorded
    head = common.header("m", [], seeds={}, started="1", seconds=0.0, threads=1)
    attention_report.store(recorded, head, [], {"a": group(1.0)}, ["a"])
    path, found = attention_cpu.target(args, box)
    assert path == recorded
    assert list(found["groups"]) == ["a"]
    path, found = attention_cpu.target(args, box | {"cpu": "another"})
    assert path.parent == tmp_path / "scratch"
    assert found["groups"] == {}


def test_quick_writes_a_whole_file_and_a_rerun_continues(tmp_path: Path) -> None:
    path = tmp_path / "quick.json"
    command = [sys.executable, "-m", attention_cpu.MODULE, "--only", "64", "--dtype", "float32"]
    command += ["--budget", "0.01", "--threads", "1", "--out", str(path)]

    def run() -> str:
        done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert "4 groups to measure, about" in run()
    payload = json.loads(path.read_text())
    assert len(payload["groups"]) == 4
    for found in payload["groups"].values():
        problem = Problem(64, causal=found["causal"], backward=found["backward"])
        assert set(found["lines"]) == {line.name for line in lines_of(problem)}
        for cell in found["lines"].values():
            assert cell["status"] in ("ok", "not available")
            if cell["status"] == "ok":
                assert len(cell["samples_s"]) >= 3
                assert cell["error"] < 1e-4
            else:
                assert cell["reason"]
    assert path.with_suffix(".png").stat().st_size > 0
    assert "0 groups to measure" in run()


def test_lengths_too_small_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert attention_cpu.main(["--only", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
