"""The benchmark of fused models: what is removed, what is measured, judged, resumed and told."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from attnbias.lowering.planner import LOWERINGS
from benchmarks import fuse, fuse_grid, fuse_measure, fuse_report
from benchmarks.fuse_bare import remove
from benchmarks.fuse_grid import BARE, FUSED, GRID, STOCK, Cell, Goal
from benchmarks.fuse_models import SUBJECTS, TABLES, Subject, Variant, call, made, twin

SMALL = {"tokens": 40, "pixels": 224, "residues": 12, "BEiT": 64}
REMOVED = {
    "T5": 6, "T5, decoding": 12, "MPT": 5, "Bloom": 5, "Falcon": 5, "gpt-oss": 4, "Swin": 24,
    "Swin v2": 12, "BEiT": 8, "LayoutLMv3": 5, "LongT5": 4, "ESMFold": 5,
    "Pairformer": 3,
}  # fmt: skip


def without_bias(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero the bias in the stock model's own terms."""
    names = (
        rf"{TABLES}|tri_att_\w+\.linear\.weight|pair_to_sequence\.linear|attention\w*\.bias\.weight"
    )
    with torch.no_grad():
        for name, one in model.named_parameters():
            if re.search(names, name):
                one.zero_()
            if "sinks" in name:
                one.fill_(-1e4)
            if "continuous_position_bias_mlp.2" in name:  # the same for all pairs then
                one.zero_()
    path = "transformers.models"

    def flat(slopes_of: Any) -> Any:
        return lambda *given, **more: 0 * slopes_of(*given, **more)

    from transformers.models.bloom import modeling_bloom
    from transformers.models.falcon import modeling_falcon
    from transformers.models.mpt import modeling_mpt

    for file, name in (
        (modeling_mpt, "build_mpt_alibi_tensor"),
        (modeling_bloom, "_get_alibi_slopes"),
        (modeling_falcon, "build_alibi_tensor"),
    ):
        where = f"{path}.{file.__name__.split('.')[-2]}.{file.__name__.split('.')[-1]}.{name}"
        monkeypatch.setattr(where, flat(getattr(file, name)))


def kind_of(name: str) -> str:
    return next(cell.kind for cell in GRID if cell.subject == name and not cell.memory)


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_the_bias_is_removed_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = SUBJECTS[name]
    size = SMALL.get(name, SMALL[subject.unit])
    model = made(subject, size)
    subject.variants[0].prepare(model)
    with_bias = call(twin(model), subject, kind_of(name), size)()
    bare = twin(model)
    assert remove(bare) == REMOVED[name]
    found = call(bare, subject, kind_of(name), size)()
    assert fuse_measure.gap(found, with_bias) > 1e-3
    without_bias(model, monkeypatch)
    wanted = call(model, subject, kind_of(name), size)()
    assert fuse_measure.gap(found, wanted) <= 2e-5


def test_every_way_of_a_stock_model_gives_the_same() -> None:
    for name in ("T5", "Swin", "BEiT", "ESMFold"):
        subject = SUBJECTS[name]
        size = SMALL.get(name, SMALL[subject.unit])
        model = made(subject, size)
        outputs = []
        for variant in subject.variants:
            state = twin(model)
            variant.prepare(state)
            outputs.append(call(state, subject, "forward", size)())
        assert len(outputs) > 1
        for one in outputs[1:]:
            assert fuse_measure.gap(one, outputs[0]) <= 1e-5


def test_copies_share_their_weights() -> None:
    model = made(SUBJECTS["T5"], 16)
    copy = twin(model)
    assert copy is not model
    assert copy.config is not model.config
    for one, other in zip(model.parameters(), copy.parameters(), strict=True):
        assert one is other


# One cell ----------------------------------------------------------------------------------------


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> Cell:
    """A T5 of one layer, and a cell of it."""
    from benchmarks import fuse_models as models

    variants = (models.SDPA, models.EAGER)
    small = Subject("T5", "small", "tokens", lambda size: models.t5(size, 1), models.ids, variants)
    monkeypatch.setitem(SUBJECTS, "T5", small)
    return Cell("T5", "forward", 640, 0.1)


def test_a_cell(one_layer: Cell) -> None:
    found = fuse_measure.guarded(one_layer, lambda: fuse_measure.timed(one_layer, 0.1))
    assert found["status"] == "ok", found
    assert set(found["stock"]) == {"sdpa", "eager"}
    lines = found["lines"]
    assert lines[STOCK]["variant"] in found["stock"]
    assert lines[FUSED]["replaced"] == 1
    assert lines[FUSED]["left"] == {}
    assert lines[FUSED]["lowering"][0] in LOWERINGS
    assert lines[BARE]["removed"] == 1
    ratios = found["ratios"]
    times = {name: line["median_s"] for name, line in lines.items()}
    assert ratios["faster"] == pytest.approx(times[STOCK] / times[FUSED], abs=2e-3)
    assert ratios["slower"] == pytest.approx(times[FUSED] / times[STOCK], abs=2e-3)
    assert ratios["over_bare"] == pytest.approx(times[FUSED] / times[BARE], abs=2e-3)
    assert ratios["difference"] <= 1e-5 < 1e-3 < ratios["moved"]
    json.dumps(found, allow_nan=False)


def test_training_and_decoding() -> None:
    """Both kinds give what depends on the bias, and the fused model's agree."""
    for name in ("T5, training", "T5, decoding"):
        subject, kind = SUBJECTS[name], kind_of(name)
        model = made(subject, 24)
        states = [twin(model) for _ in range(3)]
        remove(states[2])
        outputs = [call(state, subject, kind, 24)() for state in states[::2]]
        fuse_measure.fused(states[1])
        from attnbias.fuse import modes

        with modes.taking("fused"):
            found = call(states[1], subject, kind, 24)()
        assert fuse_measure.gap(found, outputs[0]) <= 1e-4
        assert fuse_measure.gap(outputs[1], outputs[0]) > 1e-3


def test_what_is_missing_or_fails_has_its_reason(
    one_layer: Cell, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = Subject(
        "T5", "", "tokens", lambda size: torch.nn.Linear(2, 2), SUBJECTS["T5"].inputs, ()
    )
    monkeypatch.setitem(SUBJECTS, "T5", linear)
    found = fuse_measure.guarded(one_layer, lambda: fuse_measure.timed(one_layer, 0.1))
    assert found["status"] == "missing"
    assert "Linear" in found["reason"]

    def broken() -> dict[str, Any]:
        raise ValueError("no such thing")

    found = fuse_measure.guarded(one_layer, broken)
    assert (found["status"], found["reason"]) == ("failed", "ValueError: no such thing")

    def absent() -> dict[str, Any]:
        raise ImportError("no module of that name")

    assert fuse_measure.guarded(one_layer, absent)["status"] == "missing"


def test_a_stock_way_that_does_not_fit_is_said(one_layer: Cell) -> None:
    subject = SUBJECTS["T5"]
    huge = Variant("huge", subject.variants[0].prepare, lambda size: 1e15)
    notes: dict[str, Any] = {}
    wide = Subject("T5", "", "tokens", subject.build, subject.inputs, (huge, subject.variants[1]))
    best, _ = fuse_measure.best(made(wide, 16), wide, one_layer, notes)
    assert best.name == "eager"
    assert notes["huge"]["status"] == "does not fit"
    assert "1000000.0 GB" in notes["huge"]["reason"]


def test_the_fastest_stock_way_is_taken(one_layer: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(fuse_measure, "_slower", {})
    subject = SUBJECTS["T5"]

    def slow(model: Any) -> None:
        model.register_forward_hook(lambda *_: time.sleep(0.2))

    ways = (Variant("slow", slow), subject.variants[0])
    wide = Subject("T5", "", "tokens", subject.build, subject.inputs, ways)
    notes: dict[str, Any] = {}
    assert fuse_measure.best(made(wide, 16), wide, one_layer, notes)[0].name == "sdpa"
    assert notes["slow"]["trial_s"] > 0.2
    large = Cell("T5", "forward", 32, 100.0)
    assert fuse_measure.best(made(wide, 16), wide, large, notes)[0].name == "sdpa"
    assert notes["slow"]["status"] == "not tried"
    assert "the time of sdpa at 640" in notes["slow"]["reason"]


def test_memory_of_one_line(one_layer: Cell) -> None:
    for line in (STOCK, FUSED, BARE):
        found = fuse_measure.peak(Cell("T5", "memory forward", 64, 0.1), line, "sdpa")
        assert found["finite"]
        assert found["peak"] >= 0.99 * found["before"] > 1e7  # the kernel counts in batches
    peaks = {STOCK: 4e9, FUSED: 1e9, BARE: 0.8e9}
    rows = {name: {"status": "ok", "peak": peak} for name, peak in peaks.items()}
    assert fuse_measure.compared(one_layer, rows) == {
        "memory": 0.25, "memory_over_bare": 1.25, "extra_mb": 200, "stock_extra_mb": 3200,
    }  # fmt: skip
    rows[STOCK] = {"status": "does not fit"}
    assert set(fuse_measure.compared(one_layer, rows)) == {"memory_over_bare", "extra_mb"}


# The run -----------------------------------------------------------------------------------------


def group(cell: Cell, **ratios: float) -> dict[str, Any]:
    line = {"status": "ok", "median_s": 0.5, "variant": "sdpa"}
    lines = {STOCK: line, FUSED: {**line, "lowering": ["stream"]}, BARE: line}
    usual = {"faster": 3.0, "slower": 0.33, "over_bare": 1.05, "difference": 1e-7}
    head = {"subject": cell.subject, "kind": cell.kind, "size": cell.size, "unit": "tokens"}
    mark = fuse_grid.fingerprint(cell.subject)
    made = {**usual, **ratios}
    return {**head, "status": "ok", "fingerprint": mark, "lines": lines, "ratios": made}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of each process that a run would have started."""
    calls: list[list[str]] = []

    def run_child(cells: Sequence[Cell], *_: Any) -> Iterator[tuple[Cell, dict[str, Any]]]:
        calls.append([cell.key for cell in cells])
        for cell in cells:
            broken = cell.subject == "Bloom"
            yield cell, fuse.failed(cell, "code -11") if broken else group(cell)

    monkeypatch.setattr(fuse, "run_child", run_child)
    monkeypatch.setattr(fuse, "speed", lambda: 1.0)
    return calls


def test_a_run_goes_on_where_it_stopped(
    runs: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fuse.json"
    given = ["--only", "MPT", "Bloom", "--kind", "forward", "--out", str(out)]
    assert fuse.main(given) == 1
    said = capsys.readouterr()
    assert "8 cells, about" in said.out
    assert "failed: Bloom/forward/512" in said.err
    assert [one[0] for one in runs] == ["MPT/forward/512", "Bloom/forward/512"]
    found = json.loads(out.read_text())
    assert found["groups"]["Bloom/forward/512"]["reason"] == "code -11"
    assert not found["complete"]
    assert "T5/forward/512" in found["missing"]
    runs.clear()
    fuse.main(given)
    assert [one[0] for one in runs] == ["Bloom/forward/512"]  # what failed is tried again
    runs.clear()
    fuse.main([*given, "--fresh"])
    assert len(runs) == 2
    text = out.with_suffix(".md").read_text()
    assert "failed: code -11" in text
    assert "| 4,096 tokens | 0.500 (sdpa) | 0.500 | 0.500 | 3.00 | 1.05 | 1e-07 | stream |" in text


def test_a_run_ends_in_time(
    runs: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fuse.json"
    assert (
        fuse.main(["--only", "T5", "--kind", "forward", "--minutes", "1", "--out", str(out)]) == 1
    )
    assert all("16384" not in key for one in runs for key in one)
    assert "T5/forward/16384" in capsys.readouterr().err
    assert fuse.main(["--only", "no such model"]) == 2


def test_the_run_fits_half_an_hour() -> None:
    budget = fuse.parser().parse_args([]).budget
    starts = fuse.START * len({cell.subject for cell in GRID if not cell.memory})
    assert sum(fuse.cost(cell, budget) for cell in GRID) + starts < 30 * 60


def test_a_changed_family_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = Cell("T5", "forward", 512, 0.5)
    assert not fuse._stale(group(cell), cell)
    assert fuse._stale(None, cell)
    assert fuse._stale(group(cell) | {"status": "missing"}, cell)
    before = {name: fuse_grid.fingerprint(name) for name in ("T5", "MPT")}
    seen: list[tuple[str, ...]] = []

    def noted(*parts: str) -> str:
        seen.append(parts)
        return "other"

    monkeypatch.setattr(fuse_grid.common, "fingerprint", noted)
    assert fuse._stale({"status": "ok", "fingerprint": before["T5"]}, cell)
    fuse_grid.fingerprint("MPT")
    assert "attnbias/fuse/families/t5.py" in seen[0]
    assert "attnbias/fuse/families/t5.py" not in seen[1]
    assert all("attnbias/lowering" in parts for parts in seen)
    for parts in seen:
        for part in parts:
            assert (fuse_grid.common.ROOT / part).exists() or part.endswith("plain"), part


def test_a_process_that_dies_leaves_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cells = [Cell("no such model", "forward", 8, 0.1), Cell("no such model", "forward", 16, 0.1)]
    monkeypatch.setattr(fuse, "fingerprint", lambda name: "")
    found = list(fuse.run_child(cells, 0.1, 120.0, 1))
    assert [cell for cell, _ in found] == cells
    assert all("the process ended with code 1" in one["reason"] for _, one in found)


# Goals -------------------------------------------------------------------------------------------


def test_goals() -> None:
    cells = {cell.key: cell for cell in GRID}
    t5 = {key: group(cell) for key, cell in cells.items() if cell.subject == "T5"}
    found = fuse_grid.verdicts(t5)
    judged = {(one["cell"], one["measure"]): one for one in found}
    assert judged["T5/forward/512", "faster"]["limit"] == 1.5
    assert judged["T5/forward/1024", "faster"]["limit"] == 2.5
    assert ("T5/forward/16384", "faster") not in judged
    assert judged["T5/forward/1024", "over_bare"]["limit"] == 1.15
    assert judged["T5/forward/2048", "over_bare"]["limit"] == 1.1
    assert judged["T5/memory forward/8192", "memory"]["limit"] == 0.25
    assert judged["T5/memory forward/8192", "memory"]["holds"] is False  # it was not measured
    assert judged["T5/forward/512", "faster"]["holds"] is True
    assert judged["T5/forward/16384", "slower"]["holds"] is True
    at_least = Goal("", "faster", 2.0, True)
    assert [at_least.holds(value) for value in (1.99, 2.0, None)] == [False, True, False]
    at_most = Goal("", "slower", 1.03)
    assert [at_most.holds(value) for value in (1.03, 1.04, None)] == [True, False, False]


def test_the_goals_are_those_that_were_set() -> None:
    """Every cell that a goal speaks of is in the grid."""
    for goal in fuse_grid.GOALS:
        assert any(goal.covers(cell) for cell in GRID), goal
    for name, size in (("MPT", 4096), ("Bloom", 4096), ("Falcon", 4096)):
        limits = [g.limit for g in fuse_grid.GOALS if g.covers(Cell(name, "forward", size, 1))]
        assert 3.0 in limits
        assert 1.03 in limits
    timed = [cell for cell in GRID if not cell.memory]
    slower = next(goal for goal in fuse_grid.GOALS if goal.measure == "slower")
    assert all(slower.covers(cell) for cell in timed)


def test_the_report_names_what_falls_short() -> None:
    cell = Cell("T5", "forward", 512, 0.5)
    bad = {cell.key: group(cell, faster=1.2, slower=0.83)}
    rows = fuse_report.goal_rows(fuse_grid.verdicts(bad))
    assert "  - FALLS SHORT: T5/forward/512: 1.2, goal at least 1.5" in rows
    assert "- times faster than stock: 0 of 1 hold" in rows
    assert "- of stock's time: 1 of 1 hold" in rows


def test_the_table_of_the_readme() -> None:
    cells = [Cell("T5", "forward", 512, 1), Cell("T5", "forward", 8192, 1)]
    groups = {cell.key: group(cell) for cell in cells}
    peaks = {STOCK: 4.9e9, FUSED: 0.98e9, BARE: 0.9e9}
    lines = {name: {"status": "ok", "peak": peak} for name, peak in peaks.items()}
    memory = Cell("T5", "memory forward", 8192, 1)
    groups[memory.key] = {**group(memory), "lines": lines}
    fold = Cell("ESMFold", "forward", 1024, 1)
    groups[fold.key] = {**group(fold), "unit": "residues"}
    smaller = Cell("ESMFold", "memory forward", 768, 1)
    groups[smaller.key] = {**group(smaller), "lines": lines}
    broken = Cell("MPT", "forward", 4096, 1)
    groups[broken.key] = fuse.failed(broken, "code -11")
    goals = fuse_grid.verdicts(groups)
    said = fuse_report.readme({"groups": groups, "goals": goals})
    assert "| T5, 512 tokens | 0.500 | 0.500 | 3.00 | 1.05 |  |" in said
    assert "| T5, 8,192 tokens | 0.500 | 0.500 | 3.00 | 1.05 | 4.90 / 0.98 |" in said
    assert (
        "| ESMFold, 1,024 residues | 0.500 | 0.500 | 3.00 | 1.05 | 4.90 / 0.98 (at 768) |" in said
    )
    assert "| MPT, 4,096 tokens | failed |" in said
    assert f"{sum(one['holds'] for one in goals)} of {len(goals)} goals hold" in said
    assert "Bloom" not in said


def test_memory_has_a_process_for_each_line(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def fresh(module: str, arguments: list[str], **_: Any) -> dict[str, Any]:
        calls.append(arguments)
        if "stock" in arguments:
            raise fuse.common.ChildFailed("exit code -9: nothing")
        return {"status": "ok", "peak": 10**9}

    monkeypatch.setattr(fuse.common, "fresh", fresh)
    cell = Cell("ESMFold", "memory forward", 768, 1.0)
    timed = Cell("ESMFold", "forward", 512, 1.0)
    known = group(timed)
    known["lines"][STOCK] = {**known["lines"][STOCK], "variant": "chunks of 16"}
    found = fuse.memory(cell, {timed.key: known}, None)
    assert [one[one.index("--line") + 1] for one in calls] == [FUSED, BARE, STOCK]
    assert {one[-1] for one in calls} == {"chunks of 16"}  # the fastest at the nearest size
    assert found["lines"][STOCK]["status"] == "does not fit"
    assert found["ratios"] == {"memory_over_bare": 1.0, "extra_mb": 0.0}
    missing = {timed.key: {**known, "status": "missing", "reason": "no such family"}}
    assert fuse.memory(cell, missing, None)["status"] == "missing"
