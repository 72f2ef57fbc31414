from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.hook import HookCase
from tests.cases.rule import RELATIVE, off, padded
from tests.steer.dense import numbering
from tests.steer.models import Subject, make, tokens

PAIRS = ((0, 0), (1, 3), (0, 2))


def directions(dim: int, seed: int = 7) -> Tensor:
    return torch.randn(len(PAIRS), dim, generator=torch.Generator().manual_seed(seed))


@contextmanager
def shifted(model: Any, alpha: float, towers: Any = None) -> Iterator[None]:
    """Queries of the pairs moved right before the eager attention of the model's own file."""
    import sys
    from unittest import mock

    numbers = numbering(model)
    files = {type(m).__module__ for m in model.modules() if id(m) in numbers}
    plain = {file: sys.modules[file].eager_attention_forward for file in files}

    def wrap(function: Any) -> Any:
        def forward(module: Any, query: Tensor, *rest: Any, **options: Any) -> Any:
            tower, layer = numbers[id(module)]
            query = query.clone()
            for pair, direction in zip(PAIRS, directions(query.shape[-1]), strict=True):
                if pair[0] == layer and (towers is None or tower in towers):
                    query[:, pair[1]] += alpha * direction
            return function(module, query, *rest, **options)

        return forward

    patches = [
        mock.patch.object(sys.modules[file], "eager_attention_forward", wrap(function))
        for file, function in plain.items()
    ]
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in patches:
            patch.stop()


class TestFocusDirections(HookCase):
    __test__ = True
    zero, small, large = 0.0, 0.2, -2.0
    padding = ("stories", "minilm", "mistral", "gpt_oss")
    caches = ("stories", "mistral", "gpt_oss")
    dims = {"stories": 8, "minilm": 32}  # noqa: RUF012

    def rule(self, strength: float, dim: int = 8, **where: Any) -> ab.rules.FocusDirections:
        vectors = tuple(tuple(row) for row in directions(dim).tolist())
        return ab.rules.FocusDirections(alpha=strength, heads=PAIRS, directions=vectors, **where)

    def steer(self, subject: Subject, strength: float) -> Any:
        rule = self.rule(strength, self.dims.get(subject.name, 8), **self.where(subject))
        return ab.steer(subject.model, rule)

    def oracle(self, subject: Subject, strength: float, model: Any) -> Any:
        return shifted(model, strength, subject.towers)


# Fitting ------------------------------------------------------------------------------------------


@pytest.fixture
def llama(request: pytest.FixtureRequest) -> Any:
    return make("stories", request).model


def examples(count: int = 4) -> list[Any]:
    ids = tokens(count, 16, seed=3)
    return [
        ab.rules.FocusExample({"input_ids": row[None]}, relevant=(3, 6), response=(12, 15))
        for row in ids
    ]


@torch.no_grad()
def shares(model: Any, given: list[Any], rule: Any = None) -> Tensor:
    """Attention from the answer to the passage by the returned maps: ``(layers, heads)``."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    found = []
    for one in given:
        maps = torch.stack(eager(**one.inputs, output_attentions=True).attentions)[:, 0]
        (a, b), (c, d) = one.relevant, one.response
        found.append(maps[:, :, c:d, a:b].sum(-1).mean(-1))
    return torch.stack(found).mean(0)


def test_heads_are_ranked_by_what_the_answer_gives_the_passage(llama: Any) -> None:
    given = examples()
    rule = ab.rules.FocusDirections(heads="all").fit(llama, given, top=5, epochs=1, progress=False)
    scores = shares(llama, given)
    best = scores.flatten().topk(5)
    heads = scores.shape[1]
    assert rule.heads == tuple((int(i) // heads, int(i) % heads) for i in best.indices)
    assert rule.fitted is not None
    assert rule.fitted.scores == pytest.approx(best.values.tolist(), abs=1e-5)
    assert rule.fitted.before == pytest.approx(float(best.values.mean()), abs=1e-5)
    assert (rule.fitted.examples, rule.fitted.epochs, rule.fitted.seed) == (4, 1, 0)


def test_candidates_are_those_of_the_rule(llama: Any) -> None:
    rule = ab.rules.FocusDirections(heads=[1, 2], layers=[0, 3]).fit(
        llama, examples(1), epochs=1, progress=False
    )
    assert sorted(rule.heads) == [(0, 1), (0, 2), (3, 1), (3, 2)]


def test_directions_raise_the_share_on_prompts_they_did_not_see(llama: Any) -> None:
    """And turned round they lower it, as published."""
    given = examples(6)
    weights = [p.clone() for p in llama.parameters()]
    rule = ab.rules.FocusDirections(heads="all").fit(
        llama, given[:4], top=4, epochs=20, rate=0.03, progress=False
    )
    assert all(torch.equal(p, w) for p, w in zip(llama.parameters(), weights, strict=True))
    assert rule.fitted is not None
    assert rule.fitted.after > 1.2 * rule.fitted.before

    def share(examples_: list[Any], alpha: float) -> float:
        looked: list[float] = []
        for one in examples_:
            with (
                torch.no_grad(),
                ab.steer(llama, replace(rule, alpha=alpha)),
                _maps(llama, rule, one, looked),
            ):
                llama(**one.inputs)
        return sum(looked) / len(looked)

    assert share(given[4:], 1.0) > share(given[4:], 0.0) > share(given[4:], -1.0)


@contextmanager
def _maps(model: Any, rule: Any, one: Any, looked: list[float]) -> Iterator[None]:
    """The share of the passage at the rule's heads, by the maps that the engine reports."""
    from attnbias.hub import attach
    from tests.cases.rule import Watch

    def look(call: Any, extra: Any, output: Tensor) -> None:
        group = call.query.shape[1] // call.key.shape[1]
        scores = call.query @ call.key.repeat_interleave(group, 1).mT * call.scale
        scores = scores + call.bias.dense()
        for layer, head in rule.heads:
            if layer == call.site.layer:
                (a, b), (c, d) = one.relevant, one.response
                looked.append(float(scores.softmax(-1)[0, head, c:d, a:b].sum(-1).mean()))

    with attach(model, Watch(look)):
        yield


def test_the_direction_is_what_plain_gradients_give(request: pytest.FixtureRequest) -> None:
    """The same search written down for one head, on a model with sinks and a window."""
    model = make("gpt_oss", request).model
    with torch.no_grad():
        model.model.layers[0].self_attn.sinks += 2  # a share that shows
    given = [
        ab.rules.FocusExample({"input_ids": row[None]}, relevant=(8, 10), response=(11, 13))
        for row in tokens(2, 13, seed=5)
    ]
    rule = ab.rules.FocusDirections(heads={0: [1]}).fit(
        model, given, epochs=3, rate=0.01, seed=4, progress=False
    )
    from attnbias.hub import attach
    from tests.cases.rule import Watch

    kept: list[Any] = []

    def look(call: Any, extra: Any, output: Tensor) -> None:
        if call.site.layer == 0:
            rest = torch.where(call.bias.dense() < 0, -torch.inf, 0.0)[0, 0, 11:13]
            kept.append((call.query[0, 1, 11:13], call.key[0, 0], rest, call.sink[1], call.scale))

    with torch.no_grad(), attach(model, Watch(look)):
        for one in given:
            model(**one.inputs)
    start = torch.randn(8, generator=torch.Generator().manual_seed(4)) * 0.01
    direction = start.requires_grad_()
    optimizer = torch.optim.AdamW([direction], lr=0.01)
    for _ in range(3):
        for query, key, rest, sink, scale in kept:
            scores = (query.detach() + direction) @ key.detach().T * scale + rest
            whole = scores.exp().sum(-1) + sink.detach().exp()
            loss = -(scores.exp()[:, 8:10].sum(-1) / whole).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert rule.heads == ((0, 1),)
    assert rule.directions[0] == pytest.approx(direction.tolist(), abs=1e-5)


@torch.no_grad()
def test_a_direction_of_the_keys_would_change_nothing(llama: Any) -> None:
    """Why the rule has none: it moves a whole row of scores by one number."""
    from dataclasses import dataclass

    @dataclass(frozen=True, kw_only=True)
    class Keys(ab.steer.Rule):
        def vectors(self, site: Any) -> Any:
            return ab.steer.Vectors(key=site.key + 0.7)

    ids = {"input_ids": tokens(1, 12)}
    plain = llama(**ids).logits
    with ab.steer(llama, Keys(heads="all")):
        assert off(llama(**ids).logits, plain) < RELATIVE


def test_what_is_refused(llama: Any) -> None:
    rule = ab.rules.FocusDirections(heads="all")
    with pytest.raises(ab.Refused, match=r"\.fit\(model, examples\)"), ab.steer(llama, rule):
        pass
    with pytest.raises(ab.AttnbiasError, match="2 vectors and 1 pairs"):
        ab.rules.FocusDirections(heads=[(0, 1)], directions=((1.0,), (2.0,)))
    with pytest.raises(ab.AttnbiasError, match="alpha must be a finite number"):
        ab.rules.FocusDirections(heads="all", alpha=float("nan"))
    short = ab.rules.FocusDirections(heads=[(0, 1)], directions=((1.0,),))
    with pytest.raises(ab.AttnbiasError, match="must have 8 entries"), ab.steer(llama, short):
        llama(**examples(1)[0].inputs)
    one = examples(1)[0]
    for given, options, words in (
        ([], {}, "got none"),
        (["text"], {}, "got str"),
        ([replace(one, relevant=(70, 80))], {}, r"relevant must be a span .*\(70, 80\)"),
        ([replace(one, response=(5, 5))], {}, "response must be a span"),
        ([one], {"top": 0}, "top must be"),
        ([one], {"epochs": 1.5}, "epochs must be"),
        ([one], {"rate": 0.0}, "rate must be above 0"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words):
            rule.fit(llama, given, **({"progress": False} | options))
    with pytest.raises(ab.AttnbiasError, match=r"model\.eval\(\)"):
        rule.fit(llama.train(), [one])
    with pytest.raises(ab.AttnbiasError, match="phase='decode' never acts"):
        replace(rule, phase="decode").fit(llama.eval(), [one])


def test_padding_of_an_example(request: pytest.FixtureRequest) -> None:
    """Spans count real tokens: a padded example gives what the bare one gives."""
    subject = make("stories", request)
    inputs, _, rows = padded(subject, "left")
    one = {"input_ids": inputs["input_ids"][1:, rows[1]]}
    more = {"input_ids": inputs["input_ids"][1:], "attention_mask": inputs["attention_mask"][1:]}
    found = [
        ab.rules.FocusDirections(heads=[0, 1]).fit(
            subject.model,
            [ab.rules.FocusExample(given, relevant=(2, 4), response=(6, 9))],
            epochs=2,
            rate=0.01,
            progress=False,
        )
        for given in (one, more)
    ]
    one_, more_ = (rule.fitted for rule in found)
    assert found[0].heads == found[1].heads
    # Directions of heads that hardly look there follow rounding: what they do is compared.
    assert one_.scores == pytest.approx(more_.scores, rel=1e-4)
    assert one_.after == pytest.approx(more_.after, rel=5e-3)
