"""GAME: the closed form of its edit, its loop beside a plain one, and nothing where it is zero."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Loop, Rule, SiteCall
from attnbias.steer.rules import GAME, Detector
from tests.cases.driver import DriverCase
from tests.cases.rule import padded
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import Subject, make
from tests.steer.test_lookback_lens import CONTEXT, fitted

OPTIONS = {"max_new_tokens": 15, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
SPANS = {"context": CONTEXT}


@dataclass(frozen=True, kw_only=True)
class _Driven(Rule):
    """GAME's looks and edits in a loop of the test's own."""

    game: GAME
    run: Callable[[Loop], None]

    def look(self, site: SiteCall) -> Tensor:
        return self.game.look(site)

    def bias(self, site: SiteCall) -> ab.Bias | None:
        return self.game.bias(site)

    def decode(self, loop: Loop) -> None:
        self.run(loop)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return make("stories", request)


def game(subject: Subject, **fields: Any) -> GAME:
    detector = fitted(subject, seed=fields.pop("seed", 0)).detector
    return GAME(**{"heads": "all", "detector": detector, "chunk": 4, **fields})


# The edit ---------------------------------------------------------------------------------------


def test_the_edit_goes_along_the_gradient_in_closed_form(subject: Subject) -> None:
    rule = game(subject, step=0.05, prior=0.3)
    assert rule.detector is not None
    weights = torch.tensor(rule.detector.weights, dtype=torch.float64)
    features = torch.rand(40, dtype=torch.float64) * 0.6 + 0.2
    edit = rule.edit(features)
    direction = weights / weights.square().mean().sqrt()
    odds = features / (1 - features) * (edit - 0.3).exp()
    moved = odds / (1 + odds)
    assert torch.allclose(moved - features, 0.05 * direction, atol=1e-9)
    assert float(rule.detector.score(moved)) > float(rule.detector.score(features))
    # The slope of F itself, by differences.
    steps = 1e-6 * torch.eye(40, dtype=torch.float64)
    slope = (rule.detector.score(features + steps) - rule.detector.score(features - steps)) / 2e-6
    assert torch.allclose(slope / slope.square().mean().sqrt(), direction, atol=1e-6)


def test_ratios_at_the_ends_stay_finite(subject: Subject) -> None:
    rule = game(subject, step=5.0)
    features = torch.cat([torch.zeros(20), torch.ones(20)]).double()
    edit = rule.edit(features)
    assert bool(torch.isfinite(edit).all())
    assert float(edit.abs().max()) <= 2 * float(torch.tensor(0.99).logit()) + 1e-9
    assert bool((edit[:20] >= 0).all())
    assert bool((edit[20:] <= 0).all())


def test_no_step_and_no_prior_is_no_edit(subject: Subject) -> None:
    features = torch.rand(40, dtype=torch.float64)
    assert bool((game(subject, step=0.0).edit(features) == 0).all())
    assert bool((game(subject, step=0.0, prior=0.7).edit(features) == 0.7).all())
    flat = replace(game(subject).detector, weights=(0.0,) * 40)  # type: ignore[type-var]
    assert bool((game(subject).__class__(heads="all", detector=flat).edit(features) == 0).all())


@pytest.mark.parametrize("name", ["stories", "mistral", "gpt_oss"])
def test_the_edit_multiplies_the_odds_of_each_ratio(
    name: str, request: pytest.FixtureRequest
) -> None:
    """In the first layer, whose input the edit does not change: exactly, for every head."""
    subject = make(name, request)
    ids = subject.inputs["input_ids"][:1, :9]
    rule = game(subject, layers=[0])
    rule = replace(rule, detector=fitted(subject, layers=[0]).detector, context=(3, 4, 5))
    assert rule.detector is not None
    count = len(rule.detector.places)
    edit = torch.linspace(-2.0, 2.0, count, dtype=torch.float64)
    pairs: list[tuple[Tensor, Tensor]] = []

    def run(loop: Loop) -> None:
        before = rule.detector.features(inner, [loop.looked])  # type: ignore[union-attr]
        loop.state["edit"] = dict(zip(rule.detector.places, edit.tolist(), strict=True))  # type: ignore[union-attr]
        loop.again()
        pairs.append((before, rule.detector.features(inner, [loop.looked])))  # type: ignore[union-attr]
        loop.append(loop.candidates(1, 99)[0])

    inner = _Driven(heads="all", layers=[0], game=rule, run=run)  # type: ignore[arg-type]
    with ab.steer(subject.model, inner):
        subject.model.generate(input_ids=ids, **OPTIONS)
    before, after = pairs[0]
    assert torch.allclose(after, (before.logit() + edit).sigmoid(), atol=2e-5)


# The loop ---------------------------------------------------------------------------------------


def plain_loop(model: Any, ids: Tensor, rule: GAME, length: int) -> tuple[Tensor, list[bool]]:
    """The same written down with whole maps: a cache, copied to go back, and edited rows."""
    from transformers import DynamicCache

    detector = rule.detector
    assert detector is not None
    weights = torch.tensor(detector.weights, dtype=torch.float64)
    context = range(*CONTEXT)

    def step(token: Tensor, cache: Any, edit: Tensor | None) -> tuple[Tensor, Tensor]:
        by_layer = None if edit is None else edit.reshape(-1, 8)

        def rewrite(layer: int) -> Any:
            def change(found: Map) -> Tensor:
                assert by_layer is not None
                factor = torch.ones_like(found.probabilities)
                inside = (found.positions >= CONTEXT[0]) & (found.positions < CONTEXT[1])
                scale = by_layer[layer].exp()[None, :, None, None]
                factor = torch.where(inside[:, None, None], scale, factor)
                new = found.probabilities * factor
                return new / (new.sum(-1, keepdim=True) + found.rest)

            return change

        edits = (
            []
            if by_layer is None
            else [DenseEdit(rewrite(layer), layers=[layer]) for layer in range(len(by_layer))]
        )
        maps: list[Tensor] = []
        with torch.no_grad(), rewritten(model, edits, maps=maps):
            out = model(input_ids=token, past_key_values=cache)
        found = []
        for weight in maps:
            row = weight[0, :, -1]
            a, b = row[:, list(context)].mean(-1), row[:, CONTEXT[1] :].mean(-1)
            found.append(a / (a + b))
        return out.logits[0, -1], torch.cat(found)

    def run(cache: Any, last: Tensor, count: int, edit: Tensor | None) -> tuple[Tensor, Tensor]:
        tokens, ratios = [], []
        for _ in range(count):
            logits, ratio = step(last, cache, edit)
            last = logits.argmax()[None, None]
            tokens.append(last)
            ratios.append(ratio)
        return torch.cat(tokens, 1), torch.stack(ratios).mean(0)

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :-1], past_key_values=cache)
    start, redone = ids.shape[1], []
    while ids.shape[1] < start + length:
        count = min(rule.chunk, start + length - ids.shape[1])
        kept = copy.deepcopy(cache)
        tokens, mean = run(cache, ids[:, -1:], count, None)
        redone.append(float((weights @ mean + detector.intercept).sigmoid()) < rule.threshold)
        if redone[-1]:
            direction = weights / weights.square().mean().sqrt() * rule.step
            edit = (mean + direction).clamp(0.01, 0.99).logit() - mean.clamp(0.01, 0.99).logit()
            cache = kept
            tokens, _ = run(cache, ids[:, -1:], count, edit)
        ids = torch.cat([ids, tokens], 1)
    return ids, redone


class TestGAME(DriverCase):
    __test__ = True

    def rule(self, subject: Subject) -> GAME:
        return game(subject, threshold=1 - 1e-9, step=0.4)

    def neutral(self, subject: Subject) -> GAME:
        return game(subject, threshold=1 - 1e-9, step=0.0)

    def oracle(self, model: Any, ids: Tensor, rule: GAME) -> Tensor:
        return plain_loop(model, ids, rule, self.count)[0]


def test_decoding_is_that_of_a_plain_loop(subject: Subject) -> None:
    """With chunks that are kept and chunks that are redone, the edited keys and values kept."""
    ids = subject.inputs["input_ids"][:1]
    plain = subject.model.generate(input_ids=ids, **OPTIONS)
    seen = set()
    for seed in range(6):
        rule = game(subject, seed=seed, step=1.0)
        assert rule.detector is not None
        # a threshold in the middle of what is found, so that both kinds of chunks come
        rule = replace(rule, detector=replace(rule.detector, intercept=-_middle(rule, subject)))
        wanted, redone = plain_loop(subject.eager(), ids, rule, 15)
        with ab.steer(subject.model, rule, spans=SPANS):
            found = subject.model.generate(input_ids=ids, **OPTIONS)
        assert torch.equal(found, wanted), seed
        if not torch.equal(found, plain):
            seen.add((True in redone[1:], False in redone))
    assert (True, True) in seen


def _middle(rule: GAME, subject: Subject) -> float:
    """A middle logit of the detector, without its intercept, on the plain text."""
    logits = []

    def run(loop: Loop) -> None:
        assert rule.detector is not None
        while not loop.finished:
            one = loop.candidates(1, rule.chunk)[0]
            logits.append(float(rule.detector.logit(rule.detector.features(inner, one.looked))))
            loop.append(one)

    inner = _Driven(heads="all", game=rule, run=run)
    with ab.steer(subject.model, inner, spans=SPANS):
        subject.model.generate(input_ids=subject.inputs["input_ids"][:1], **OPTIONS)
    assert rule.detector is not None
    order = sorted(logits)  # of four: between the second and the third, where no rounding matters
    return (order[1] + order[2]) / 2 - rule.detector.intercept


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("threshold", [1e-9, 1 - 1e-9])
def test_a_zero_edit_is_plain_decoding(subject: Subject, sample: bool, threshold: float) -> None:
    """Every chunk kept, or every chunk redone with nothing: the same tokens, also sampled."""
    options = {**OPTIONS, "do_sample": sample, "top_k": 0} if sample else OPTIONS
    ids = subject.inputs["input_ids"][:1]
    step = 0.0 if threshold > 0.5 else 0.4
    torch.manual_seed(8)
    plain = subject.model.generate(input_ids=ids, **options)
    torch.manual_seed(8)
    with ab.steer(subject.model, game(subject, threshold=threshold, step=step), spans=SPANS):
        found = subject.model.generate(input_ids=ids, **options)
    assert torch.equal(found, plain)
    torch.manual_seed(8)
    with ab.steer(subject.model, game(subject, threshold=1 - 1e-9, step=0.4), spans=SPANS):
        edited = subject.model.generate(input_ids=ids, **options)
    assert not torch.equal(edited, plain)


def test_a_chunk_redone_with_an_edit_of_zero_is_the_chunk_bit_for_bit(subject: Subject) -> None:
    rule = game(subject)
    counted = []

    def run(loop: Loop) -> None:
        loop.append(loop.candidates(1, 3)[0])
        while not loop.finished:
            start = loop.snapshot()
            one = loop.candidates(1, 4, sample=True)[0]
            loop.rewind(start, random=True)
            loop.again()
            loop.state["edit"] = dict.fromkeys(rule.detector.places, 0.0)  # type: ignore[union-attr]
            two = loop.candidates(1, 4, sample=True)[0]
            del loop.state["edit"]
            assert torch.equal(one.tokens, two.tokens)
            for before, after in zip(one.looked, two.looked, strict=True):
                assert all(torch.equal(before[site], after[site]) for site in before)
                counted.append(len(before))
            loop.append(two)

    with ab.steer(subject.model, _Driven(heads="all", game=rule, run=run), spans=SPANS):
        subject.model.generate(input_ids=subject.inputs["input_ids"][:1], **OPTIONS)
    assert counted == [5] * 12


def test_rows_of_a_batch_are_what_they_are_alone(subject: Subject) -> None:
    inputs, _, rows = padded(subject, "left")
    del inputs["position_ids"]
    rule = game(subject, threshold=1 - 1e-9, step=0.3)
    spans = [(1, 5), (2, 4)]
    with ab.steer(subject.model, rule, spans={"context": spans}):
        found = subject.model.generate(**inputs, **OPTIONS)
    for row, part in enumerate(rows):
        with ab.steer(subject.model, rule, spans={"context": spans[row]}):
            alone = subject.model.generate(
                input_ids=inputs["input_ids"][row : row + 1, part], **OPTIONS
            )
        assert torch.equal(found[row, part.start :], alone[0])


def test_an_exception_in_an_edited_chunk_leaves_no_edit(subject: Subject) -> None:
    rule = game(subject, threshold=1 - 1e-9, step=0.4)
    ids = subject.inputs["input_ids"][:1]
    calls = []

    def enough(given: Tensor, scores: Any, **more: Any) -> Tensor:
        calls.append(given.shape[1])
        if len(calls) == 6:  # in the first chunk's second run
            raise RuntimeError("in the middle")
        return torch.zeros(len(given), dtype=torch.bool)

    plain = subject.model.generate(input_ids=ids, **OPTIONS)
    with ab.steer(subject.model, rule, spans=SPANS):
        wanted = subject.model.generate(input_ids=ids, **OPTIONS)
        with pytest.raises(RuntimeError, match="in the middle"):
            subject.model.generate(input_ids=ids, **OPTIONS, stopping_criteria=[enough])
        with torch.no_grad():
            inside = subject.model(input_ids=ids).logits
        assert torch.equal(subject.model.generate(input_ids=ids, **OPTIONS), wanted)
    with torch.no_grad():
        assert torch.equal(subject.model(input_ids=ids).logits, inside)
    assert torch.equal(subject.model.generate(input_ids=ids, **OPTIONS), plain)


def test_what_is_missing_or_wrong(subject: Subject) -> None:
    with (
        pytest.raises(ab.errors.Refused, match=r"detector=lens\.detector"),
        ab.steer(subject.model, GAME(heads="all"), spans=SPANS),
    ):
        pass
    for fields, words in (
        ({"chunk": 0}, "chunk must"),
        ({"threshold": 1.0}, "threshold must"),
        ({"clip": 0.5}, "clip must"),
        ({"step": float("nan")}, "step must"),
        ({"prior": float("inf")}, "prior must"),
        ({"phase": "prefill"}, "phase must"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words):
            GAME(heads="all", **fields)  # type: ignore[arg-type]
    wrong = game(subject, detector=Detector(((0, 0),), (1.0,), 0.0))
    with (
        ab.steer(subject.model, wrong, spans=SPANS),
        pytest.raises(ab.AttnbiasError, match="fitted on 1 heads"),
    ):
        subject.model.generate(input_ids=subject.inputs["input_ids"], **OPTIONS)


def test_a_rule_survives_a_recipe(subject: Subject, tmp_path: Path) -> None:
    rule = game(subject, step=0.2, threshold=0.7)
    ab.Recipe.of(subject.model, rule).save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json").rules == (rule,)
