"""The benchmark of the planner's choices: its problems, its arithmetic, a small run, its record."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from attnbias.cli import calibration
from attnbias.lowering import costs
from benchmarks import common, planner


def test_the_problems_are_drawn_by_the_seed_and_none_was_calibrated_on() -> None:
    cases = planner.cases()
    assert len(cases) == planner.COUNT == 200
    assert cases == planner.cases()
    known = {dataclasses.replace(case, seed=0) for case in calibration.cases()}
    assert not known & {dataclasses.replace(case, seed=0) for case in cases}
    assert {case.direction for case in cases} == {"forward", "training", "learned"}
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16"}
    assert sum(len(case.structures) > 1 for case in cases) > 40
    assert any(case.dropout for case in cases)
    assert any(case.key_heads < case.heads for case in cases)


def one(regret: float, **seconds: float) -> dict[str, object]:
    return {
        "seconds": seconds,
        "regret": dict.fromkeys(planner.POLICIES, regret),
        "choices": dict.fromkeys(planner.POLICIES, "a"),
        "planning": 1e-4,
    }


def test_the_summary_and_its_verdict() -> None:
    few = [one(1.0, a=1.0, b=2.0), one(1.02, a=1.02, b=1.0), one(1.6, a=1.6, b=1.0), one(1, a=1.0)]
    told = planner.summary(few)
    assert told["with a choice"] == 3
    assert told["planner"]["median"] == 1.02
    assert told["planner"]["worst"] == 1.6
    assert told["holds"] == {"median": True, "worst": False}
    assert planner.summary(few[:1])["holds"] == {"median": True, "worst": True}


def test_a_small_run_is_written_and_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = sorted(planner.cases(), key=lambda case: case.work)[:3]
    monkeypatch.setattr(planner, "cases", lambda: cases)
    monkeypatch.setattr(common, "SCRATCH", tmp_path)
    monkeypatch.setattr(calibration, "ROUNDS", (1, 2))
    assert planner.main(["--quick", "--minutes", "1"]) == 0
    path = tmp_path / "quick_planner.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert len(found["problems"]) == 3
    for record in found["problems"]:
        best = min(record["seconds"].values())
        chosen = record["choices"]["planner"]
        assert record["regret"]["planner"] == pytest.approx(
            record["seconds"][chosen] / best, rel=1e-2
        )
        assert "reference" not in record["seconds"]
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "chose the fastest" in text
    monkeypatch.setattr(planner, "measured", lambda *_: pytest.fail("measured again"))
    assert planner.main(["--quick", "--minutes", "1"]) == 0
    assert json.loads(path.read_text(encoding="utf-8"))["problems"] == found["problems"]


def test_the_shipped_table_is_the_recorded_one() -> None:
    recorded = common.RESULTS / "costs.json"
    assert recorded.exists() == costs.SHIPPED.exists()
    if not recorded.exists():
        return
    assert recorded.read_bytes() == costs.SHIPPED.read_bytes()
    for table in costs.read(costs.SHIPPED):
        kept = calibration.measured(recorded.with_suffix(".jsonl"))
        mine = [record for record in kept if record["device"] == table.device]
        assert len(mine) > 300
        found = calibration.fit([r | {"counts": calibration.counts_of(r)} for r in mine[:1]])
        assert set(found) <= set(table.seconds)
        assert table.serves(calibration.problem_of(planner.cases(1)[0]))


def test_what_is_recorded_says_what_its_problems_say() -> None:
    path = common.RESULTS / "planner.json"
    if not path.exists():
        assert not path.with_suffix(".md").exists()
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["summary"] == planner.summary(found["problems"])
    assert path.with_suffix(".md").read_text(encoding="utf-8") == planner.report(found)
    threads = found["machine"]["threads"]
    assert f"{threads} thread" in found["table"], "measured with the table's own threads"
    assert torch.__version__.partition("+")[0] in found["versions"]["torch"]
