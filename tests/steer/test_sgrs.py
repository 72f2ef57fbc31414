"""SGRS: saliency beside whole maps, the acceptance rule by hand, decoding beside a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Loop, Rule, SiteCall
from attnbias.steer.rule import Heads, Layers
from attnbias.steer.rules import SGRS
from attnbias.steer.rules.sgrs import Row
from tests.cases.driver import DriverCase
from tests.cases.rule import padded
from tests.steer.models import Subject, make

OPTIONS = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}
SPANS = {"image": (1, 5)}


@dataclass(frozen=True, kw_only=True)
class _Driven(Rule):
    """SGRS's hooks in a loop of the test's own."""

    heads: Heads = "all"
    layers: Layers
    sgrs: SGRS
    run: Callable[[Loop], None]

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        return self.sgrs.outputs(site, out)

    def look(self, site: SiteCall) -> Row | None:
        return self.sgrs.look(site)

    def decode(self, loop: Loop) -> None:
        self.run(loop)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return make("stories", request)


def whole_maps(
    model: Any, ids: Tensor, token: int, layers: Any, start: int, row: str = "predicting"
) -> float:
    """The saliency from whole maps and their gradients (the eager attention of the model)."""
    if row == "candidate":
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    place = -2 if row == "candidate" else -1
    with torch.enable_grad():
        out = model(input_ids=ids, output_attentions=True)
        loss = -out.logits[0, place].log_softmax(-1)[token]
        maps = [out.attentions[layer] for layer in layers]
        grads = torch.autograd.grad(loss, maps)
    found = []
    for weights, grad in zip(maps, grads, strict=True):
        salient = (weights * grad).detach().abs().tril()[0].mean(0)
        salient = salient / salient.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        stop = ids.shape[1] - 1 if row == "candidate" else ids.shape[1]
        found.append(float(salient[-1, start:stop].mean()))
    return mean(found)


@pytest.mark.parametrize("name", ["stories", "mistral", "gpt_oss"])
def test_saliency_is_that_of_whole_maps(name: str, request: pytest.FixtureRequest) -> None:
    """At the prompt and further on; GQA, windows that still show all, sinks."""
    subject = make(name, request)
    ids = subject.inputs["input_ids"][:1, :4]
    rule = SGRS(layers=(0, 1), after=(1,))
    checked: list[float] = []

    def run(loop: Loop) -> None:
        for _ in range(2):
            step = loop.step_with_gradients()
            for token in (3, 17, 40):
                found = rule.saliency(step, token)
                wanted = whole_maps(eager, loop.tokens, token, (0, 1), 2)
                assert found == pytest.approx(wanted, rel=2e-3, abs=1e-5)
                checked.append(wanted)
            loop.append(17)
        loop.append(loop.candidates(1, 99)[0])

    eager = subject.eager()
    with ab.steer(subject.model, _Driven(layers=rule.layers, sgrs=rule, run=run)):
        subject.model.generate(input_ids=ids, **OPTIONS)
    assert len(checked) == 6
    assert max(checked) - min(checked) > 1e-3


def test_the_published_row_has_no_gradient(subject: Subject) -> None:
    """Under a causal mask the candidate's own row cannot touch its probability: exactly 0."""
    ids = subject.inputs["input_ids"][:1, :9]
    rule = SGRS(layers=(1, 2), after=(1,), row="candidate")
    eager = subject.eager()
    found: list[float | None] = []

    def run(loop: Loop) -> None:
        step = loop.step_with_gradients()
        for token in (3, 17, 40):
            found.append(rule.saliency(step, token))
            assert whole_maps(eager, loop.tokens, token, (1, 2), 2, "candidate") == 0.0
        loop.append(loop.candidates(1, 99)[0])

    with ab.steer(subject.model, _Driven(layers=rule.layers, sgrs=rule, run=run)):
        subject.model.generate(input_ids=ids, **OPTIONS)
    assert found == [0.0, 0.0, 0.0]


# The acceptance rule ------------------------------------------------------------------------------


class Scores:
    """Saliencies by token, and which were asked for."""

    def __init__(self, by_token: dict[int, float | None]) -> None:
        self.by_token, self.asked = by_token, list[int]()

    def __call__(self, token: int) -> float | None:
        self.asked.append(token)
        return self.by_token[token]


def order(*tokens: int) -> Tensor:
    """Weights under which tokens 0 to 4 are drawn in this order, almost surely."""
    weights = torch.zeros(5)
    for place, token in enumerate(tokens):
        weights[token] = 1e-9**place
    return weights


TRACES: dict[
    str, tuple[dict[str, Any], list[float], dict[int, float | None], int, list[int], Any]
] = {
    # fields, history, scores, the token taken, the tokens asked for, the history afterwards
    "first score without history": ({}, [], {2: 0.0}, 2, [2], [0.0]),
    "at the threshold": ({}, [0.5, 1.0], {2: 0.45}, 2, [2], [0.5, 1.0, 0.45]),
    "below it once": ({}, [0.5, 1.0], {2: 0.449, 0: 0.7}, 0, [2, 0], [0.5, 1.0, 0.7]),
    "the window forgets": (
        {"window": 2},
        [9.0, 0.1, 0.1],
        {2: 0.06},
        2,
        [2],
        [9.0, 0.1, 0.1, 0.06],
    ),
    "three rounds, then the best of all": (
        {},
        [1.0],
        {2: 0.1, 0: 0.3, 1: 0.2, 3: 0.25, 4: 0.55},
        4,
        [2, 0, 1, 3, 4],
        [1.0, 0.55],
    ),
    "three rounds, a rejected one is best": (
        {},
        [1.0],
        {2: 0.1, 0: 0.5, 1: 0.2, 3: 0.25, 4: 0.5},
        0,
        [2, 0, 1, 3, 4],
        [1.0, 0.5],
    ),
    "one round": (
        {"rounds": 1},
        [1.0],
        {2: 0.1, 0: 0.2, 1: 0.3, 3: 0.5, 4: 0.4},
        3,
        [2, 0, 1, 3, 4],
        [1.0, 0.5],
    ),
    "cold start as published": ({}, [], {2: None}, 2, [2], [1.0]),
    "cold start skipped": ({"cold_start": "skip"}, [], {2: None}, 2, [2], []),
    "alpha 0 takes everything": ({"alpha": 0.0}, [5.0], {2: 0.0}, 2, [2], [5.0, 0.0]),
}


@pytest.mark.parametrize("name", TRACES)
def test_traces_by_hand(name: str) -> None:
    fields, history, by_token, taken, asked, after = TRACES[name]
    scores, kept = Scores(by_token), list(history)
    torch.manual_seed(0)
    rule = SGRS(**fields)
    assert rule.choose([0, 1, 2, 3, 4], order(2, 0, 1, 3, 4), scores, kept) == taken
    assert scores.asked == asked
    assert kept == pytest.approx(after)


def test_the_published_cold_start_raises_the_threshold() -> None:
    """A remembered 1 refuses what the sound start takes."""
    found = {}
    for start in ("score 1", "skip"):
        rule, history = SGRS(cold_start=start), list[float]()  # type: ignore[arg-type]
        rule.choose([0, 1, 2, 3, 4], order(2, 0, 1, 3, 4), lambda token: None, history)
        scores = Scores({2: 0.3, 0: 0.7, 1: 0.0, 3: 0.0, 4: 0.0})
        found[start] = rule.choose([0, 1, 2, 3, 4], order(2, 0, 1, 3, 4), scores, history)
    assert found == {"score 1": 0, "skip": 2}


def test_tokens_are_drawn_by_their_weights() -> None:
    torch.manual_seed(0)
    weights = torch.tensor([0.6, 0.3, 0.1])
    rule = SGRS(count=3)
    drawn = [rule.choose([7, 8, 9], weights, lambda token: 1.0, []) for _ in range(600)]
    for token, share in ((7, 0.6), (8, 0.3), (9, 0.1)):
        assert drawn.count(token) / 600 == pytest.approx(share, abs=0.06)


# Decoding -----------------------------------------------------------------------------------------


def plain_loop(model: Any, ids: Tensor, rule: SGRS, length: int, start: int) -> Tensor:
    """The same decoding with whole maps and no cache."""
    history: list[float] = []
    for _ in range(length):
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, -1].softmax(-1).topk(rule.count)
        token = rule.choose(
            best.indices.tolist(),
            best.values,
            lambda token: whole_maps(model, ids, token, rule.layers, start, rule.row),  # noqa: B023
            history,
        )
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return ids


class TestSGRS(DriverCase):
    __test__ = True
    span = "image"
    plain_by: ClassVar[dict[str, Any]] = {}

    def rule(self, subject: Subject) -> SGRS:
        return SGRS(layers=(1, 3))

    def oracle(self, model: Any, ids: Tensor, rule: SGRS) -> Tensor:
        return plain_loop(model, ids, rule, self.count, self.place[1])


@pytest.mark.parametrize("fields", [{}, {"row": "candidate"}, {"alpha": 1.0, "count": 3}])
def test_decoding_is_that_of_a_plain_loop(subject: Subject, fields: dict[str, Any]) -> None:
    ids = subject.inputs["input_ids"][:1]
    rule = SGRS(**{"layers": (1, 3), **fields})
    torch.manual_seed(4)
    wanted = plain_loop(subject.eager(), ids, rule, 9, 5)
    torch.manual_seed(4)
    with ab.steer(subject.model, rule, spans=SPANS):
        found = subject.model.generate(input_ids=ids, **OPTIONS)
    assert torch.equal(found, wanted)


def test_the_published_form_is_top_k_sampling(subject: Subject) -> None:
    """With a score of 0 everywhere the first token drawn is what comes out."""
    ids = subject.inputs["input_ids"][:1]
    rule = SGRS(layers=(1, 3), row="candidate", rounds=1)
    torch.manual_seed(4)
    with ab.steer(subject.model, rule, spans=SPANS):
        found = subject.model.generate(input_ids=ids, **OPTIONS)
    torch.manual_seed(4)
    plain = subject.model.generate(input_ids=ids, **OPTIONS, do_sample=True, top_k=5, top_p=1.0)
    # multinomial over five tokens takes other numbers than over all: drawn here by hand
    torch.manual_seed(4)
    wanted = ids
    for _ in range(9):
        with torch.no_grad():
            best = subject.model(input_ids=wanted).logits[0, -1].softmax(-1).topk(5)
        pick = best.indices[torch.multinomial(best.values, 1)]
        wanted = torch.cat([wanted, pick[None]], 1)
    assert torch.equal(found, wanted)
    assert plain.shape == found.shape


def test_nothing_to_look_back_at(subject: Subject) -> None:
    """The whole prompt is the image: the first token is taken unscored, the next are scored."""
    ids = subject.inputs["input_ids"][:1]
    for start in ("score 1", "skip"):
        torch.manual_seed(4)
        rule = SGRS(layers=(1,), cold_start=start)  # type: ignore[arg-type]
        with ab.steer(subject.model, rule, spans={"image": (0, 13)}):
            found = subject.model.generate(input_ids=ids, **OPTIONS)
        assert found.shape == (1, 22)


def test_the_settings_of_the_call_hold(subject: Subject) -> None:
    """Processors, eos and seeds; the image of a real prompt with rows of their own."""
    ids = subject.inputs["input_ids"][:1]
    banned = subject.model.generate(input_ids=ids, **OPTIONS, do_sample=False)[0, 13:].unique()
    rule = SGRS(layers=(1,))
    more = {"suppress_tokens": banned.tolist()}
    with ab.steer(subject.model, rule, spans=SPANS):
        torch.manual_seed(1)
        found = subject.model.generate(input_ids=ids, **OPTIONS, **more)
        torch.manual_seed(1)
        again = subject.model.generate(input_ids=ids, **OPTIONS, **more)
        stop = int(found[0, 16])
        torch.manual_seed(1)
        short = subject.model.generate(
            input_ids=ids, **{**OPTIONS, "eos_token_id": stop, "max_new_tokens": 9}, **more
        )
    assert not set(found[0, 13:].tolist()) & set(banned.tolist())
    assert torch.equal(found, again)
    first = found[0, 13:].tolist().index(stop)
    assert short[0, 13:].tolist()[: first + 1] == found[0, 13 : 14 + first].tolist()
    assert short.shape[1] == 14 + first


def test_rows_have_their_own_image(subject: Subject) -> None:
    inputs, _, rows = padded(subject, "left")
    del inputs["position_ids"]
    rule = SGRS(layers=(1,))
    torch.manual_seed(1)
    with ab.steer(subject.model, rule, spans={"image": [(1, 5), (2, 4)]}):
        found = subject.model.generate(**inputs, **OPTIONS)
    torch.manual_seed(1)
    for row, (part, span) in enumerate(zip(rows, ((1, 5), (2, 4)), strict=True)):
        with ab.steer(subject.model, rule, spans={"image": span}):
            ids = inputs["input_ids"][row : row + 1, part]
            alone = subject.model.generate(input_ids=ids, **OPTIONS)
        assert torch.equal(found[row, part.start :], alone[0])


def test_a_vision_language_model(request: pytest.FixtureRequest) -> None:
    subject = make("llava", request)
    rule = SGRS(layers=(1, 2), towers=("text",))
    with ab.steer(subject.model, rule, spans=subject.spans):
        found = subject.model.generate(**subject.inputs, **OPTIONS)
    assert found.shape == (2, 25)


def test_a_plain_forward_is_left_alone(subject: Subject) -> None:
    plain = subject.run()
    with ab.steer(subject.model, SGRS(layers=(1,)), spans=SPANS):
        assert torch.equal(subject.run(), plain)
        subject.run().sum().backward()


def test_what_is_missing_or_wrong(subject: Subject, tmp_path: Path) -> None:
    with (
        pytest.raises(ab.AttnbiasError, match="layer 8, but"),
        ab.steer(subject.model, SGRS(), spans=SPANS),
    ):
        pass
    for fields, words in (
        ({"count": 0}, "count must"),
        ({"rounds": 0}, "rounds must"),
        ({"window": True}, "window must"),
        ({"alpha": -1.0}, "alpha must"),
        ({"row": "last"}, "row must be one of"),
        ({"cold_start": 1.0}, "cold_start must be one of"),
        ({"phase": "decode"}, "phase must"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words):
            SGRS(**fields)  # type: ignore[arg-type]
    rule = SGRS(layers=(1,), alpha=0.5, row="candidate")
    ab.Recipe.of(subject.model, rule).save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json").rules == (rule,)
