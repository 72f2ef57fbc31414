"""The engine: order, nesting, rows that are left alone, hooks that return nonsense."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Causal, Dense, KeyBias, Padding, Relative, Segments
from attnbias.hub import Call, attach
from attnbias.lowering import costs
from attnbias.steer.placing import OnHeads, place, reach, take
from attnbias.steer.shares import Fold, log_ratio
from tests.cases.rule import RELATIVE, Watch, off
from tests.steer.dense import DenseEdit, Map, give, multiply, rewritten
from tests.steer.models import Subject, make
from tests.steer.sample_rules import PerHead, Returns, SetShare

KeyShift, ZeroTuning = ab.rules.KeyShift, ab.rules.ZeroTuning


@pytest.fixture(params=["stories", "gpt_oss", "vit"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


@pytest.fixture
def mistral(request: pytest.FixtureRequest) -> Subject:
    return make("mistral", request)


def at(*positions: int) -> Any:
    def chosen(found: Map) -> Tensor:
        return torch.isin(found.positions, torch.tensor(positions))

    return chosen


# Order and nesting ----------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_rules_compose_in_order_and_contexts_nest(subject: Subject, split: int) -> None:
    """Biases sum first; reallocations follow in order; an outer context goes first."""
    rules = [
        SetShare(keys=[1, 2], share=0.7, heads=[0, 1]),
        KeyShift(keys=[0, 4], amount=1.5, heads=[1, 2]),
        SetShare(keys=[2, 5], share=0.4, heads=[0, 1, 3]),
        ZeroTuning(factor=0.3, heads="all", layers=[0, 1]),
    ]
    edits = [
        DenseEdit(multiply(at(0, 4), torch.tensor(1.5).double().exp()), heads=[1, 2]),
        DenseEdit(multiply(at(0), 0.3), layers=[0, 1]),
        DenseEdit(give(at(1, 2), 0.7), heads=[0, 1]),
        DenseEdit(give(at(2, 5), 0.4), heads=[0, 1, 3]),
    ]
    eager = subject.eager()
    length = 17 if subject.name == "vit" else 13
    positions = torch.arange(length)[None]
    with rewritten(eager, edits, positions):
        wanted = subject.run(eager)
    with contextlib.ExitStack() as stack:
        for part in (rules[:split], rules[split:]):
            if part:
                stack.enter_context(ab.steer(subject.model, *part))
        found = subject.run()
    assert off(found, wanted) < RELATIVE
    swapped = [*edits[:2], edits[3], edits[2]]
    with rewritten(eager, swapped, positions):
        assert off(found, subject.run(eager)) > 30 * RELATIVE


@torch.no_grad()
def test_opposite_shifts_cancel_to_the_plain_output(subject: Subject) -> None:
    plain = subject.run()
    up, down = (KeyShift(keys=[2], amount=a, heads=[0]) for a in (1.25, -1.25))
    with ab.steer(subject.model, up), ab.steer(subject.model, down):
        assert torch.equal(subject.run(), plain)


@torch.no_grad()
def test_inner_context_leaves_the_outer_one_as_it_was(subject: Subject) -> None:
    outer, inner = (KeyShift(keys=[k], amount=2.0, heads="all") for k in (1, 3))
    with ab.steer(subject.model, outer):
        first = subject.run()
        with ab.steer(subject.model, inner):
            assert not torch.equal(subject.run(), first)
        assert torch.equal(subject.run(), first)


@torch.no_grad()
def test_a_dense_bias_that_differs_per_head(subject: Subject) -> None:
    """The general structure, on some heads, beside a key bias on others."""
    PerHead.seen.clear()
    rule = PerHead(strength=2.0, heads=[3, 1])

    def rewrite(found: Map) -> Tensor:
        _, heads, queries, keys = found.probabilities.shape
        generator = torch.Generator().manual_seed(queries * 1000 + keys)
        table = torch.randn(1, 64, queries, keys, generator=generator, dtype=torch.float64)
        weights = found.probabilities * (2.0 * table[:, :heads]).exp()
        return weights / (weights.sum(-1, keepdim=True) + found.rest)

    shift = KeyShift(keys=[1], amount=1.0, heads=[0, 1])
    with ab.steer(subject.model, rule, shift):
        found = subject.run()
    assert set(PerHead.seen) == {(1, 3)}
    eager = subject.eager()
    edits = [
        DenseEdit(rewrite, heads=[1, 3]),
        DenseEdit(multiply(at(1), torch.tensor(1.0).double().exp()), heads=[0, 1]),
    ]
    with rewritten(eager, edits, torch.arange(17 if subject.name == "vit" else 13)[None]):
        assert off(found, subject.run(eager)) < RELATIVE


# Rows that are left alone -------------------------------------------------------------------------


def first_layer(subject: Subject, *rules: ab.steer.Rule, **options: Any) -> tuple[Tensor, Tensor]:
    """Edited and plain output of layer 0."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
        if call.site.layer == 0:
            found.append((output, call.plain()))

    with ab.steer(subject.model, *rules, **options), attach(subject.model, Watch(look)):
        subject.run()
    return found[0]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bias", "reallocate"])
def test_queries_that_do_not_see_the_key_are_plain(mistral: Subject, kind: str) -> None:
    """Before the key (causal) and after it has left the window, nothing may change."""
    rule = (
        KeyShift(keys=[4], amount=2.0, heads="all")
        if kind == "bias"
        else SetShare(keys=[4], share=0.9, heads="all")
    )
    # The eager route rounds differently from ours, so rows that we computed would show.
    mistral.model.set_attn_implementation("eager")
    edited, plain = first_layer(mistral, rule)
    same = (edited == plain).all(-1).all(-1).all(0)
    # The window of 6: query i sees keys i - 5 to i.
    assert same.tolist() == [not 4 <= i <= 9 for i in range(13)]


@torch.no_grad()
def test_batch_rows_without_the_span_are_plain(mistral: Subject) -> None:
    rule = KeyShift(keys="question", amount=2.0, heads="all")
    mistral.model.set_attn_implementation("eager")
    spans = {"question": [(2, 4), None]}
    # By measured costs a bias for one row and one for all may take two lowerings.
    with costs.unmeasured():
        edited, plain = first_layer(mistral, rule, spans=spans)
        alone, _ = first_layer(mistral, rule, spans={"question": (2, 4)})
    assert torch.equal(edited[1], plain[1])
    assert not torch.equal(edited[0], plain[0])
    assert torch.equal(alone[0], edited[0])


@torch.no_grad()
def test_padding_queries_are_plain(mistral: Subject) -> None:
    mistral.model.set_attn_implementation("eager")
    keep = torch.ones_like(mistral.inputs["input_ids"])
    keep[1, 9:] = 0
    mistral.inputs["attention_mask"] = keep
    for rule in (
        KeyShift(keys=range(13), amount=2.0, heads=[0]),
        SetShare(keys=range(5, 8), share=0.9, heads=[1]),
    ):
        edited, plain = first_layer(mistral, rule)
        assert torch.equal(edited[1, 9:], plain[1, 9:])
        assert not torch.equal(edited[1, :9], plain[1, :9])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_folded_columns_keep_their_digits(dtype: torch.dtype) -> None:
    """Columns of query times columns of key give the table, also in half formats."""
    table = 8 * torch.randn(2, 3, 5, 4)
    groups = torch.randint(0, 4, (2, 1, 6))
    query, key, value = (torch.zeros(2, h, n, 8, dtype=dtype) for h, n in ((4, 5), (2, 6), (2, 6)))
    fold = Fold(table, groups, (0, 2, 3))
    query, key, value = fold.apply(query, key, value, range(4), 0.3)
    assert query.dtype == key.dtype == dtype
    found = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.3
    wanted = torch.zeros(2, 4, 5, 6)
    wanted[:, [0, 2, 3]] = fold.bias().dense()
    assert off(found, wanted) < 1e-6


# Hooks that return nonsense ----------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bias_value": 3}, "must return a Bias or None, got int"),
        ({"bias_value": KeyBias(torch.ones(5))}, r"fits \(batch, heads, queries, keys\)"),
        ({"bias_value": KeyBias(torch.ones(7, 13))}, r"fits \(batch, heads, queries, keys\)"),
        ({"shares": lambda m: -m}, "below 0"),
        ({"shares": lambda m: m * float("nan")}, "not finite"),
        ({"shares": lambda m: m * 0.9}, "keep the total"),
        ({"shares": lambda m: m, "groups_value": torch.zeros(1, 1, 13)}, "must return integers"),
        ({"shares": lambda m: m, "groups_value": torch.zeros(13).long()}, "must return integers"),
        (
            {"shares": lambda m: m, "groups_value": torch.full((1, 1, 13), -1)},
            "must hold numbers from 0 to .*, got -1",
        ),
    ],
)
def test_hooks_are_checked(mistral: Subject, fields: dict[str, Any], words: str) -> None:
    plain = mistral.run()
    rule = Returns(heads=[0, 1], **fields)
    with pytest.raises(ab.AttnbiasError, match=words) as caught, ab.steer(mistral.model, rule):
        mistral.run()
    assert "\n" not in str(caught.value)
    assert torch.equal(mistral.run(), plain)


@torch.no_grad()
def test_a_group_without_mass_cannot_receive(mistral: Subject) -> None:
    groups = (torch.arange(13) == 4).long()[None, None]
    rule = Returns(heads="all", groups_value=groups, shares=lambda m: m.flip(-1))
    with pytest.raises(ab.AttnbiasError, match="cannot receive"), ab.steer(mistral.model, rule):
        mistral.run()


def test_log_ratio_is_exact_at_the_ends() -> None:
    old = torch.tensor([[0.0, 1.0], [1e-29, 1.0], [0.25, 0.75], [0.5, 0.5]])
    new = torch.tensor([[0.0, 1.0], [1.0, 1e-38], [0.25, 0.75], [0.0, 1.0]])
    found = log_ratio(old, new, "Rule")
    assert torch.equal(found[0], torch.zeros(2))
    assert torch.isfinite(found[1]).all()
    assert torch.equal(found[2], torch.zeros(2))
    assert found[3, 0] == -torch.inf
    assert found[3, 1] == pytest.approx(0.6931472)


@torch.no_grad()
def test_masses_are_handed_over_with_the_sinks_share_missing(
    request: pytest.FixtureRequest,
) -> None:
    subject = make("gpt_oss", request)
    totals: list[Tensor] = []
    maps: list[Tensor] = []

    def shares(masses: Tensor) -> Tensor:
        totals.append(masses.sum(-1))
        return masses

    groups = torch.arange(13)[None, None] % 3
    with ab.steer(subject.model, Returns(heads=[2, 0], groups_value=groups, shares=shares)):
        subject.run()
    eager = subject.eager()
    with rewritten(eager, [], torch.arange(13)[None], maps):
        subject.run(eager)
    for total, one in zip(totals, maps, strict=True):
        assert off(total, one.sum(-1)[:, [0, 2]]) < 1e-5
        assert float(one.sum(-1).min()) < 0.7  # the sinks do take something


@torch.no_grad()
def test_groups_may_differ_per_row_and_head(request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    torch.manual_seed(3)
    groups = torch.randint(0, 3, (2, 3, 13))
    groups[:, :, :3] = torch.arange(3)

    def shares(masses: Tensor) -> Tensor:
        total = masses.sum(-1, keepdim=True)
        target = total * torch.tensor([0.2, 0.3, 0.5])
        return torch.where((masses > 0).all(-1, keepdim=True), target, masses)

    heads = [1, 4, 6]
    rule = Returns(heads=heads, layers=[0], groups_value=groups, shares=shares)

    def rewrite(found: Map) -> Tensor:
        new = found.probabilities.clone()
        for b in range(2):
            for own, head in enumerate(heads):
                for i in range(13):
                    row = new[b, head, i]
                    kept = [groups[b, own] == g for g in range(3)]
                    mass = [float(row[k].sum()) for k in kept]
                    if min(mass) > 1e-30:
                        for k, m, t in zip(kept, mass, (0.2, 0.3, 0.5), strict=True):
                            row[k] *= t / m
        return new

    with ab.steer(subject.model, rule):
        found = subject.run()
    eager = subject.eager()
    with rewritten(eager, [DenseEdit(rewrite, layers=[0], heads=heads)]):
        assert off(found, subject.run(eager)) < RELATIVE
    assert off(subject.run(), found) > 30 * RELATIVE


@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
@pytest.mark.parametrize("share", [0.6, 0.0])
@torch.no_grad()
def test_half_precision(how: str, share: float, request: pytest.FixtureRequest) -> None:
    """In half formats the edited call errs about as much as the plain one does."""
    subject = make("stories", request)
    rules = (SetShare(keys=[1, 2], share=share, heads="all"), ZeroTuning(factor=3.0, heads=[0, 3]))
    plain = subject.run()
    with ab.steer(subject.model, *rules):
        exact = subject.run()
    if how == "autocast":
        context: Any = torch.autocast("cpu", torch.bfloat16)
    else:
        context = contextlib.nullcontext()
        subject.model.to(getattr(torch, how))
    with context:
        plain_error = off(subject.run().float(), plain)
        with ab.steer(subject.model, *rules):
            found = subject.run()
    assert found.dtype == (torch.bfloat16 if how == "autocast" else getattr(torch, how))
    assert off(found.float(), exact) < 3 * plain_error
    assert off(plain, exact) > 5 * plain_error


@torch.no_grad()
def test_a_share_of_nothing_hides_the_keys(subject: Subject) -> None:
    """New shares of exactly 0, in values and in gradients."""
    rule = SetShare(keys=[1, 2], share=0.0, heads=[0, 2])
    with ab.steer(subject.model, rule):
        found = subject.run()
        with torch.enable_grad():
            subject.run().square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in subject.model.parameters())
    eager = subject.eager()
    length = 17 if subject.name == "vit" else 13
    edit = DenseEdit(give(at(1, 2), 0.0), heads=[0, 2])
    with rewritten(eager, [edit], torch.arange(length)[None]):
        assert off(found, subject.run(eager)) < RELATIVE


# Entering --------------------------------------------------------------------------------------


def test_what_steer_refuses(mistral: Subject, request: pytest.FixtureRequest) -> None:
    model = mistral.model
    shift = KeyShift(keys="question", amount=1.0, heads="all")
    bart = make("bart decoder", request)
    for call, words in (
        (lambda: ab.steer(model), "at least one rule"),
        (lambda: ab.steer(model, "KeyShift"), "got str"),
        (lambda: ab.steer(model, KeyShift), "got KeyShift itself"),
        (lambda: ab.steer(model, shift), "needs the span 'question'; spans has first"),
        (lambda: ab.steer(model, shift, spans={"question": (3, 1)}), r"spans\['question'\]"),
        (lambda: ab.steer(model, shift, spans={"question": 3}), r"spans\['question'\]"),
        (
            lambda: ab.steer(model, shift, spans={"question": [(0, 1)] * 2, "a": [(0, 1)] * 3}),
            "one entry or one per row",
        ),
        (
            lambda: ab.steer(bart.model, KeyShift(keys=[0], amount=1.0, heads="all")),
            "names no tower and the model has encoder, decoder, cross",
        ),
    ):
        with pytest.raises(ab.AttnbiasError, match=words) as caught, call():
            pass
        assert "\n" not in str(caught.value)
    with (
        pytest.raises(ab.Refused, match="given for 3 rows and the model runs 2"),
        ab.steer(model, shift, spans={"question": [(0, 1)] * 3}),
    ):
        mistral.run()


@torch.no_grad()
def test_a_rule_that_met_nothing_is_told(mistral: Subject) -> None:
    for rule, words in (
        (KeyShift(keys=[60], amount=1.0, heads="all"), "none of its keys was there"),
        (ZeroTuning(factor=2.0, heads="all", phase="decode"), "phase 'decode'"),
    ):
        with pytest.warns(UserWarning, match=words), ab.steer(mistral.model, rule):
            mistral.run()
    quiet = (
        KeyShift(keys=[60, 2], amount=1.0, heads="all"),
        KeyShift(keys=[60], amount=0.0, heads="all"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ab.steer(mistral.model, *quiet):
            mistral.run()
        with ab.steer(mistral.model, KeyShift(keys=[60], amount=1.0, heads="all")):
            pass  # no forward: nothing to tell


@torch.no_grad()
def test_first_is_refused_in_packed_sequences(request: pytest.FixtureRequest) -> None:
    """Each packed sequence has a first token of its own; a row alone is no packed sequence."""
    subject = make("stories", request)
    rule = ZeroTuning(factor=2.0, heads="all")
    packed = torch.cat([torch.arange(6), torch.arange(7)])[None].expand(2, -1)
    with pytest.raises(ab.Refused, match="attends in segments"), ab.steer(subject.model, rule):
        subject.run(position_ids=packed, use_cache=False)
    with ab.steer(subject.model, rule, spans={"first": (6, 7)}):
        found = subject.run(position_ids=packed, use_cache=False)
    alone = subject.inputs["input_ids"][:, 6:]
    with ab.steer(subject.model, rule):
        wanted = subject.model(input_ids=alone).logits
        whole = subject.run(position_ids=torch.arange(13)[None].expand(2, -1), use_cache=False)
        assert off(whole, subject.run()) < RELATIVE
    assert off(found[:, 6:], wanted) < RELATIVE
    assert torch.equal(found[:, :6], subject.run(position_ids=packed, use_cache=False)[:, :6])


def test_rules_are_final_and_the_base_is_abstract() -> None:
    with pytest.raises(TypeError, match="final"):
        type("Mine", (KeyShift,), {})
    with pytest.raises(TypeError, match="abstract"):
        ab.steer.Rule(heads="all")


# Biases on some heads ---------------------------------------------------------------------------


BIASES = {
    "key": lambda: KeyBias(torch.randn(1, 3, 6)),
    "key for all": lambda: KeyBias(torch.randn(6)),
    "relative": lambda: Relative(torch.randn(3, 10), queries=5, keys=6),
    "bucketed": lambda: ab.Bucketed(
        torch.randn(2, 3, 4, 2), torch.randint(0, 4, (1, 3, 5)), torch.randint(0, 2, (2, 1, 6))
    ),
    "dense": lambda: Dense(torch.randn(2, 3, 5, 6)),
    "mask": lambda: Causal(5, 6),
    "sum": lambda: Dense(torch.randn(1, 3, 5, 6)) + KeyBias(torch.randn(6)) + Causal(5, 6),
}


@pytest.mark.parametrize("name", sorted(BIASES))
def test_placing_and_taking_heads(name: str) -> None:
    bias = BIASES[name]()
    whole = bias.dense().expand(-1, 3, 5, 6)
    placed = place(bias, (1, 4, 5), 7)
    wanted = torch.zeros(whole.shape[0], 7, 5, 6)
    wanted[:, [1, 4, 5]] = whole.float()
    assert torch.equal(placed.dense().expand_as(wanted), wanted)
    assert torch.equal(
        placed[:, 1:5, 1:4, 2:6].dense().expand(-1, 4, 3, 4), wanted[:, 1:5, 1:4, 2:]
    )
    assert torch.equal(placed.transpose().dense().expand(-1, 7, 6, 5), wanted.mT)
    taken = take(placed, (4, 0), 7)
    assert torch.equal(taken.dense().expand(-1, 2, 5, 6), wanted[:, [4, 0]])
    rebuilt = placed.with_parameters(list(placed.parameters()))
    assert torch.equal(rebuilt.dense().expand_as(wanted), wanted)


def test_the_general_fallback_keeps_gradients() -> None:
    table = torch.randn(1, 3, 5, 6, requires_grad=True)
    query, key, value = (torch.randn(1, 7, n, 4) for n in (5, 6, 6))
    bias = OnHeads(Dense(table), (-1, 0, -1, 2, 1, -1, -1))
    out = ab.attention(query, key, value, bias=bias)
    (found,) = torch.autograd.grad(out.square().sum(), table)
    dense = Dense(bias.dense())
    out = ab.attention(query, key, value, bias=dense, lowering="reference")
    (wanted,) = torch.autograd.grad(out.square().sum(), table)
    assert off(found, wanted) < 1e-5


@pytest.mark.parametrize("own", ["none", "causal", "padding", "segments", "heads", "float"])
@pytest.mark.parametrize("name", ["key", "key for all", "bucketed", "few rows", "dense"])
@pytest.mark.parametrize("classes", [0, 64])
def test_reach_is_what_the_dense_matrices_say(
    own: str, name: str, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnbias.steer.placing.CLASSES", classes)
    edit = BIASES[name if name != "few rows" else "dense"]()
    if name == "few rows":  # one query of each row, one key of each row
        table = torch.zeros(2, 3, 2, 6)
        table[0, 1, 1, 4], table[1, 2, 1, 0], table[1, 0, 1, 5] = 1.0, -torch.inf, 2.0
        rows = (torch.arange(5) == torch.tensor([[4], [2]])).long()[:, None]
        edit = ab.Bucketed(table, rows, torch.arange(6)[None, None])
    if name == "key":
        edit = KeyBias(edit.weight * (torch.rand(1, 3, 6) < 0.3))
    if name == "dense":
        edit = Dense(edit.tensor * (torch.rand(1, 3, 5, 6) < 0.1))
    mask = {
        "none": None,
        "causal": Causal(5, 6),
        "padding": Padding(torch.tensor([[True] * 6, [False] * 3 + [True] * 3])),
        "segments": Segments(torch.arange(5) // 2, torch.arange(6) // 2),
        "heads": Dense(torch.rand(1, 3, 5, 6) < 0.4),
        "float": Dense(torch.randn(1, 3, 5, 6)) + Causal(5, 6),
    }[own]
    seen = torch.ones(5, 6, dtype=torch.bool) if mask is None else mask.dense() > -torch.inf
    wanted = ((edit.dense() != 0) & seen).expand(2, 3, 5, 6).any(-1)
    found = reach(edit, mask, (2, 3, 5, 6))
    assert torch.equal(found, wanted)
