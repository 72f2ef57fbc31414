"""The GPU suite without a GPU: structures written out twice, truths, counts, goals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.gpu import bsa, bsa_whole, group, report, seen, truth, work
from benchmarks.gpu.case import Case, counts, floors
from benchmarks.gpu.ceilings import measure as ceilings
from benchmarks.gpu.device import Device
from benchmarks.gpu.group import Goal, verdicts
from benchmarks.gpu.kinds import ALIBI, KEY, PAIR, PENGUIN, SWIN, T5, low_rank
from benchmarks.gpu.radial_kinds import FIELD, SCAN, SOLVER
from tests.benchmarks.gpu_results import result

CPU = Device("cpu")
WINDOWS = {"window": 3, "grid": 6, "shift": 1}
CASES = (
    Case("a", low_rank(3), "cpu", 2, 4, 9, 8, dtype="float32"),
    Case("a", ALIBI, "cpu", 1, 3, 9, 8, causal=True, dtype="float32"),
    Case("a", KEY, "cpu", 2, 2, 9, 8, dtype="float32"),
    Case("b", SCAN, "cpu", 2, 2, 9, 8, dtype="float32"),
    Case("c", FIELD, "cpu", 1, 2, 9, 8, keys=7, dtype="float32"),
    Case("c", FIELD, "cpu", 1, 2, 9, 8, dtype="float32", more={"itself": True}),
    Case("d", SOLVER, "cpu", 1, 2, 9, 8, dtype="float32"),
    Case("e", SWIN, "cpu", 4, 2, 9, 8, dtype="float32", more={"window": 3}),
    Case("e", SWIN, "cpu", 8, 2, 9, 8, dtype="float32", more=WINDOWS),
    Case("f", T5, "cpu", 1, 2, 150, 8, dtype="float32"),
    Case("f", T5, "cpu", 1, 2, 150, 8, causal=True, dtype="float32"),
    Case("g", PAIR, "cpu", 3, 2, 9, 8, dtype="float32"),
    Case("h", PENGUIN, "cpu", 2, 6, 60, 8, groups=3, causal=True, dtype="float32"),
)
names = [f"{case.script} {case.name}" for case in CASES]


def entries(case: Case, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix of the library's bias, hidden entries of a causal case at 0."""
    whole = case.kind.make(case, given).dense().double()
    whole = whole.expand(case.batch, case.heads, case.queries, case.m)
    return masked(case, whole)


def masked(case: Case, whole: torch.Tensor) -> torch.Tensor:
    late = torch.ones(case.queries, case.m, dtype=torch.bool).triu(1 + case.m - case.queries)
    return whole.masked_fill(late, 0.0) if case.causal else whole


@pytest.mark.parametrize("case", CASES, ids=names)
def test_rows_are_those_of_the_bias(case: Case) -> None:
    given = case.kind.draw(case)
    picked = case.picked
    rows = case.kind.rows(case, given, picked).double()
    assert rows.shape[0] in (1, len(picked.batches))
    want = entries(case, given)[picked.batches][:, :, picked.rows]
    keys = torch.arange(case.m)
    if case.causal:
        late = keys > picked.rows[:, None] + case.m - case.queries
        rows = rows.expand(len(picked.batches), case.heads, -1, -1).masked_fill(late, 0.0)
    torch.testing.assert_close(rows.expand_as(want), want, atol=1e-5, rtol=0)
    assert want[want > -math.inf].abs().max() > 0.1


@pytest.mark.parametrize("case", CASES, ids=names)
def test_score_functions_are_the_bias(case: Case) -> None:
    given = case.kind.draw(case)
    assert case.kind.score is not None
    score = case.kind.score(case, given)
    shape = (case.batch, case.heads, case.queries, case.m)
    b, h, i, j = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
    found = masked(case, score(torch.zeros(shape), b, h, i, j).double())
    torch.testing.assert_close(found, entries(case, given), atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES, ids=names)
def test_the_truth_is_attention_with_its_gradients(case: Case) -> None:
    """By another route: autograd through the library's dense matrix over all rows."""
    inputs, given = case.inputs(), case.kind.draw(case)
    found = truth.answer(case, inputs, given)
    leaves = {
        name: tensor.double().requires_grad_()
        for name, tensor in zip(("query", "key", "value"), inputs, strict=False)
    }
    double = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    for name in case.kind.learned:
        leaves[name] = double[name] = double[name].clone().requires_grad_()
    share = case.heads // case.key_heads
    k, v = (leaves[name].repeat_interleave(share, 1) for name in ("key", "value"))
    scores = leaves["query"] @ k.mT * case.size**-0.5 + case.kind.make(case, double).dense()
    if case.causal:
        late = torch.ones(case.queries, case.m, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(late, -math.inf)
    output = scores.softmax(-1) @ v
    gradient = truth.sparse(case, inputs[3]).double()
    slopes = torch.autograd.grad(output, list(leaves.values()), gradient)
    errors = truth.errors(case, found, output.float(), dict(zip(leaves, slopes, strict=True)))
    assert set(errors) == {"output", "query", "key", "value", *case.kind.learned}
    assert max(errors.values()) < 1e-5, errors
    bare = truth.answer(case, inputs, {}, biased=False)
    assert truth.gap(bare.output, found.output) > 0.02


def test_a_wrong_or_missing_gradient_shows() -> None:
    case = CASES[2]
    inputs, given = case.inputs(), case.kind.draw(case)
    want = truth.answer(case, inputs, given)
    output = torch.zeros_like(inputs[0])
    output[case.picked.batches[:, None], :, case.picked.rows] = want.output.float().movedim(2, 1)
    good = {"weight": want.gradients["weight"]}
    assert truth.errors(case, want, output, good)["output"] < 1e-6
    bad = {"weight": 1.1 * good["weight"], "pair": good["weight"]}
    found = truth.errors(case, want, output, bad)
    assert 0.05 < found["weight"] < 0.2
    assert found["pair"] == truth.WRONG
    assert truth.gap(torch.tensor([math.nan]), torch.ones(1)) == truth.WRONG


def test_costs_are_counted() -> None:
    case = Case("f", T5, "cpu", 2, 4, 100, 64)
    given = {"table": torch.zeros(32, 4)}
    need = counts(case, given)
    pairs = 2 * 4 * 100 * 100
    assert need["forward"]["tensor"] == 4 * pairs * 64
    assert need["backward"]["tensor"] == 10 * pairs * 64
    tensors = 2 * 4 * 100 * 64 * 2
    assert need["forward"]["copy"] == 4 * tensors + 4 * 800 + 512
    folded = replace(case, kind=low_rank(16))
    assert counts(folded, {}, biased=False) != counts(folded, {
        name: torch.zeros(4, 100, 16) for name in "uv"
    })  # fmt: skip
    assert replace(case, causal=True).pairs == 2 * 4 * 100 * 101 // 2
    radial = replace(case, kind=SCAN)
    assert counts(radial, radial.kind.draw(radial))["forward"]["exp2"] == 9 * pairs
    card = {"bfloat16": 1e12, "exp2": 1e9, "fma": 1e12, "copy": 1e12, "tf32": 6e11, "float32": 1e11}
    found = floors(need["forward"], card, "bfloat16")
    assert found["bound"] == "exp2"
    assert found["floor_s"] == pytest.approx(pairs / 1e9)
    exact = floors(need["forward"], card, "float32")
    assert exact["seconds"]["tensor"] == pytest.approx(4 * pairs * 64 / 2e11)
    assert floors(need["forward"], {}, "bfloat16")["floor_s"] == 0.0


def test_ceilings_have_every_resource() -> None:
    found = ceilings(CPU)
    assert {"copy", "bfloat16", "float16", "tf32", "float32"} <= set(found)
    assert all(value > 0 for value in found.values())


# Goals -------------------------------------------------------------------------------------------


def test_goals_are_met_or_not() -> None:
    big = Case("f", KEY, "cpu", 8, 8, 1024, 64)
    goal = Goal("forward", 1.2, group.over_flash("forward"), group.filled)
    payload: dict[str, Any] = {"groups": {"f/good": result(big, 1.1), "g/other": result(big, 9.0)}}
    assert verdicts("f", [goal], payload)[0]["verdict"] == "holds"
    payload["groups"]["f/slow"] = result(big, 1.3)
    found = verdicts("f", [goal], payload)[0]
    assert (found["verdict"], found["met"], len(found["cells"])) == ("falls short", 1, 2)
    small = replace(big, batch=1, queries=256)
    payload["groups"] = {"f/small": result(small, 9.0)}
    assert verdicts("f", [goal], payload)[0]["verdict"] == "not measured"


def test_a_wrong_or_unsteady_answer_meets_no_goal() -> None:
    big = Case("f", KEY, "cpu", 8, 8, 1024, 64)
    assert group.reason(result(big, 1.0)) == ""
    wrong = result(big, 1.0, error={"output": 0.5})
    assert group.reason(wrong) == "wrong: output is off by 5.0e-01"
    odd = result(big, 1.0, repeats={"output": True, "key": False})
    assert group.reason(odd) == "two runs differ in key"
    gone = result(big, 1.0)
    gone["lines"]["ours"] = {"status": "refused", "reason": "no such heads"}
    assert group.reason(gone) == "no such heads"
    goal = Goal("forward", 1.2, group.over_flash("forward"), group.filled)
    assert verdicts("f", [goal], {"groups": {"f/x": odd}})[0]["verdict"] == "falls short"


def test_memory_is_held_against_what_is_stored() -> None:
    case = Case("a", low_rank(8), "cpu", 2, 4, 4096, 64)
    made = result(case, 1.0)
    unit = 4 * case.units * 2 * 4096 * 9
    made["lines"]["ours"]["memory_both"] = 10 + 3 * unit
    assert group.MEMORY.value(made, {}) == pytest.approx(3.0)
    made["lines"]["ours"]["memory_both"] = None
    assert group.MEMORY.value(made, {}) is None
    assert not group.MEMORY.meets(None)


def test_published_times_are_scaled_by_the_card() -> None:
    """A card six times as fast must be sixty times as fast as the scan."""
    case = Case("bsa", SCAN, "cpu", 32, 4, 4096, 64)
    made = result(case, 1.0)
    made["lines"]["ours"]["backward"] = {"median_s": 0.342 / 60}
    payload = {"groups": {"bsa/x": made}, "ceilings": {"bfloat16": 6 * 165.2e12}}
    found = verdicts("bsa", bsa.GOALS, payload)
    scan = next(one for one in found if "JAX" in one["goal"])
    assert scan["cells"][0]["value"] == pytest.approx(10.0)
    published = next(one for one in found if "FlexAttention" in one["goal"])
    assert published["cells"][0]["value"] == pytest.approx(4.292 / 6 / (0.342 / 60), rel=1e-3)
    assert published["verdict"] == "holds"


def test_the_whole_case_counts_six_blocks_of_both() -> None:
    groups = {}
    for label in (bsa_whole.ITSELF, "test to context"):
        case = bsa_whole.case(label, "bfloat16", CPU)
        groups[f"bsa_whole/{case.name}"] = result(case, 1.0)
    found = verdicts("bsa_whole", bsa_whole.GOALS, {"groups": groups})[0]
    assert [one["value"] for one in found["cells"]] == [pytest.approx(6 * 0.002)]


@pytest.mark.parametrize("name", work.SCRIPTS)
def test_every_goal_speaks_of_a_group(name: str) -> None:
    """A goal that covers nothing would never fall short."""
    made = [one for one in work.all_groups(False).values() if one.script == name]
    for goal in work.script(name).GOALS:
        assert any(goal.covers(one.about) for one in made if one.about), goal.words
    assert any(one.tier == 1 for one in made)
    assert [one for one in work.all_groups(True).values() if one.script == name]


def test_the_statistics_are_what_they_say() -> None:
    case = seen.case(30, True, True, "cpu")
    q, k, _, _ = (tensor.float() for tensor in case.inputs())
    table = T5.draw(case)["table"]
    ids = torch.arange(30) % seen.PARTS
    found = seen.truth(case, q, k, table, ids)
    bias = seen.added(case, table)
    assert bias is not None
    weight = (q @ k.mT * case.size**-0.5 + bias.dense()).double().softmax(-1)
    assert torch.allclose(found["received"], weight.sum(2), atol=1e-5)
    assert torch.allclose(found["top"], weight.sort(-1, descending=True).values[..., :4], atol=1e-5)
    assert torch.allclose(found["entropy"], torch.special.entr(weight).sum(-1), atol=1e-5)
    shares = torch.stack([weight[..., ids == part].sum(-1) for part in range(seen.PARTS)], -1)
    assert torch.allclose(found["shares"], shares, atol=1e-5)


def test_the_report_says_what_falls_short() -> None:
    big = Case("t5", T5, "cpu", 8, 8, 4096, 64)
    groups = {"t5/slow": result(big, 1.7), "t5/gone": {"status": "failed", "reason": "code -11"}}
    needs = counts(big, T5.draw(big))["forward"]
    card = {"bfloat16": 8e14, "exp2": 4e12, "fma": 3e13, "copy": 4e12}
    groups["t5/slow"]["floors"] = {"ours": {"forward": floors(needs, card, "bfloat16")}}
    found = verdicts("t5", work.script("t5").GOALS, {"groups": groups})
    said = report.goals(found)
    assert "1.7 (goal at most 1.3)" in said
    assert "| falls short |" in said
    table = report.one("t5/slow", groups["t5/slow"])
    assert "| ours | 1.700 | 1.70 | 1.700 | 1.70 | 1.70 |" in table
    assert "bound by" in table
    assert "failed: code -11" in report.one("t5/gone", groups["t5/gone"])
