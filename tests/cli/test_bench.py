"""`attnbias bench`: the times of a problem, and the table of costs it measures."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch

from attnbias import cli, native
from attnbias.cli import calibration, problems
from attnbias.lowering import costs, work

CPU = torch.device("cpu")
SMALL = {"most": 3e6, "least": 1e4}


def few() -> list[problems.Case]:
    source = random.Random(3)
    cases = [
        problems.draw(source, structures, direction, **SMALL)
        for structures in [(), ("table",), ("rbf", "key")]
        for direction in ("forward", "training")
    ]
    return [*cases, problems.draw(source, ("table",), "learned", **SMALL)]


@pytest.fixture
def calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The table that `bench --calibrate` makes of a few small problems."""
    if not native.installed():
        pytest.skip("compiled loops: numba is not installed")
    monkeypatch.setattr(calibration, "cases", few)
    monkeypatch.setattr(calibration, "ROUNDS", (1, 2))
    path = tmp_path / "made" / "costs.json"
    assert cli.main(["bench", "--calibrate", "--out", str(path), "--minutes", "1"]) == 0
    return path


def test_a_calibration_makes_a_table_that_the_planner_takes(
    calibrated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert calibrated.with_suffix(".jsonl").read_text(encoding="utf-8").count("\n") == len(few())
    (table,) = costs.read(calibrated)
    assert table.device == costs.device_kind(CPU)
    assert "training float32" in table.lowerings["stream"]
    assert table.seconds["operator float32 products"] >= 0
    with costs.using(calibrated):
        case = few()[1]
        line = f"bench --queries {case.queries} --keys {case.keys} --bias alibi --dim {case.size}"
        assert cli.main(line.split()) == 0
    text = capsys.readouterr().out
    assert "stream" in text
    assert "no bias" in text
    assert f"measured: {table.measured}" in text


@pytest.mark.parametrize("words", ["", "--train", "--learned", "--train --learned"])
@pytest.mark.parametrize("bias", ["none", "t5"])
def test_the_times_of_one_problem(
    bias: str, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "ROUNDS", (1, 1))
    line = f"bench --queries 20 --heads 2 --dim 8 --bias {bias} {words}"
    assert cli.main(line.split()) == 0
    text = capsys.readouterr().out
    rows = [row.split() for row in text.splitlines()]
    assert [row for row in rows if row and row[0] == "->"]
    assert any(row[:2] == ["no", "bias"] for row in rows) == (bias != "none")
    assert ("backward" in text) == bool(words)
    assert ("what the bias stores" in text) == ("learned" in words)


def test_it_goes_on_where_it_was_interrupted(
    calibrated: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = calibrated.with_suffix(".jsonl")
    lines = kept.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == len(few())
    kept.write_text("".join(lines[:3]) + lines[3][:40], encoding="utf-8")
    measured: list[problems.Case] = []
    told = calibration.seconds
    monkeypatch.setattr(
        calibration, "seconds", lambda case, *rest: (measured.append(case), told(case, *rest))[1]
    )
    again = ["bench", "--calibrate", "--out", str(calibrated), "--minutes", "1"]
    assert cli.main(again) == 0
    assert measured == few()[3:]
    assert kept.read_text(encoding="utf-8").startswith("".join(lines[:3]))
    assert len(calibration.measured(kept)) == len(few())
    measured.clear()
    assert cli.main(again) == 0
    assert not measured
    assert "7 of 7 problems" in capsys.readouterr().out
    assert cli.main([*again, "--fresh"]) == 0
    assert len(measured) == len(few())


def test_tables_of_other_devices_stay(calibrated: Path) -> None:
    given = json.loads(calibrated.read_text(encoding="utf-8"))
    given["tables"].append({**given["tables"][0], "device": "cuda Some Card"})
    calibrated.write_text(json.dumps(given), encoding="utf-8")
    again = ["bench", "--calibrate", "--out", str(calibrated), "--minutes", "1"]
    assert cli.main(again) == 0
    kinds = {table.device for table in costs.read(calibrated)}
    assert kinds == {"cuda Some Card", costs.device_kind(CPU)}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["bench"], "--queries"),
        (["bench", "--queries", "8", "--fresh"], "--calibrate"),
        (["bench", "--queries", "8", "--out", "costs.json"], "--calibrate"),
        (["bench", "--calibrate", "--minutes", "0"], "'0'"),
        (["bench", "--calibrate", "--device", "nowhere"], "nowhere"),
        (["bench", "--queries", "8", "--bias", "swin"], "swin"),
    ],
)
def test_wrong_options(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attnbias: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_file_that_is_no_table_is_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.json"
    path.write_text("[1, 2]", encoding="utf-8")
    assert cli.main(["bench", "--calibrate", "--out", str(path)]) == 2
    assert "no table of costs" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "[1, 2]"


# Problems and the fit ----------------------------------------------------------------------------


def test_the_problems_are_the_same_in_every_run_and_cover_all() -> None:
    cases = calibration.cases()
    assert cases == calibration.cases()
    assert len({dataclasses.replace(case, seed=0) for case in cases}) == len(cases)
    seen = {(name, case.direction) for case in cases for name in case.structures}
    for name in problems.STRUCTURES:
        assert (name, "forward") in seen
        assert (name, "training") in seen
        assert (name, "learned") in seen or name in problems.FIXED
    assert {case.dtype for case in cases} == {"float32", "bfloat16", "float16"}
    for case in cases:
        assert case.keys >= case.queries or not case.causal
        assert problems.Case.of(json.loads(json.dumps(dataclasses.asdict(case)))) == case


@pytest.mark.parametrize("name", sorted(problems.STRUCTURES))
def test_every_structure_is_built_and_counted(name: str) -> None:
    source = random.Random(5)
    direction = "training" if name in problems.FIXED else "learned"
    case = problems.draw(source, (name,), direction, most=1e7, least=1e3)
    query, key, _, bias = case.build(CPU)
    assert query.shape == (case.batch, case.heads, case.queries, case.size)
    assert key.shape == (case.batch, case.key_heads, case.keys, case.size)
    assert query.requires_grad
    assert bias is not None
    assert bias.requires_grad == (direction == "learned")
    again = case.build(CPU)[3]
    assert again is not None
    for one, two in zip(bias.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    problem = calibration.problem_of(case)
    counts = work.counts("stream", problem)
    assert counts["stream products"] > 0


def test_the_fit_finds_seconds_that_made_the_times() -> None:
    truth = {"a call": 1e-4, "a products": 2e-11, "b call": 3e-4, "shared": 5e-10, "never": 0.0}
    source = random.Random(1)
    records = []
    for _ in range(40):
        work, made = 10 ** source.uniform(5, 9), 10 ** source.uniform(3, 7)
        counts = {
            "a": {"a call": 1.0, "a products": work, "shared": made, "never": work},
            "b": {"b call": 1.0, "shared": made, "unused": 0.0},
        }
        times = {
            name: sum(truth.get(k, 0.0) * n for k, n in own.items()) for name, own in counts.items()
        }
        noise = {name: t * source.uniform(0.99, 1.01) for name, t in times.items()}
        case = {"direction": "forward", "dtype": "float32"}
        records.append({"case": case, "counts": counts, "seconds": noise})
    found = calibration.fit(records)
    assert "unused" not in found
    for name in ("a call", "a products", "b call", "shared"):
        assert found[name] == pytest.approx(truth[name], rel=0.05)
    assert found["never"] < 2e-12
    assert max(calibration.deviations(records, found).values()) < 0.02


def test_least_squares_stay_above_zero_and_fit_as_well_as_can_be() -> None:
    source = torch.Generator().manual_seed(0)
    matrix = torch.rand(60, 12, generator=source, dtype=torch.float64)
    right = matrix @ torch.randn(12, generator=source, dtype=torch.float64)
    found = calibration.nonnegative(matrix, right)
    assert bool((found >= 0).all())
    # The conditions of Karush, Kuhn and Tucker: no slope where it is free, none downhill at 0.
    slope = matrix.mT @ (matrix @ found - right)
    assert float(slope[found > 0].abs().max()) < 1e-8
    assert float(slope[found == 0].min()) > -1e-8
