from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RELATIVE, RuleCase, off
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import Subject, make, tokens

THRESHOLD = 0.04  # one head that is looked at attends to little but its first token


def found_sinks(p: Tensor, real: Tensor, keys: Tensor, limit: Any, spare: str) -> Tensor:
    """Bool (batch, heads, keys), straight from the map. real: (batch, queries), keys: positions."""
    rows = p * real[:, None, :, None]
    seen = (rows > 0).sum(2)
    found = (rows.sum(2) / seen.clamp(min=1) > limit) & (keys >= 0)[:, None]
    for row, head in itertools.product(range(found.shape[0]), range(found.shape[1])):
        places = found[row, head].nonzero()[:, 0].tolist()
        if spare == "first":
            places = [n for n in places if keys[row % len(keys), n] == 0]
        for n in places[:1]:
            found[row, head, n] = False
    return found


def calibrate(p: Tensor, sinks: Tensor, beta: float) -> Tensor:
    """The edit of the authors' code: scale the sinks, spread what is freed by the other weights."""
    sinks = sinks[:, :, None]
    others = p * ~sinks
    total = others.sum(-1, keepdim=True)
    freed = (1 - beta) * (p * sinks).sum(-1, keepdim=True)
    some = total > 1e-30
    new = torch.where(sinks, beta * p, p) + freed * others / torch.where(some, total, 1.0)
    return torch.where(some, new, p)


class Dense:
    """Sinks by the prompt's rows (those up to a chunk), kept layer by layer for what follows."""

    def __init__(
        self, beta: float, limit: Any = THRESHOLD, spare: str = "found", chunks: Sequence[int] = ()
    ) -> None:
        self.beta, self.limit, self.spare, self.chunks = beta, limit, spare, chunks
        self.kept: list[Tensor] = []
        self.turn = 0

    def __call__(self, found: Map) -> Tensor:
        p, where = found.probabilities, found.positions
        if found.decoding:
            sinks = self.kept[self.turn % len(self.kept)]
            self.turn += 1
            more = p.shape[3] - sinks.shape[2]
            return calibrate(p, torch.nn.functional.pad(sinks, (0, more)), self.beta)
        if self.turn:
            self.kept, self.turn = [], 0
        square = p.shape[2] == p.shape[3]
        real = where >= 0 if square else torch.ones(1, p.shape[2], dtype=torch.bool)
        limit = self.limit(where) if callable(self.limit) else self.limit
        parts, start = [], 0
        for size in self.chunks or [p.shape[2]]:
            rows = slice(start, start + size)
            shown = rows.stop if square else p.shape[3]
            sinks = found_sinks(
                p[:, :, : rows.stop, :shown],
                real[:, : rows.stop],
                where[:, :shown],
                limit,
                self.spare,
            )
            sinks = torch.nn.functional.pad(sinks, (0, p.shape[3] - shown))
            parts.append(calibrate(p[:, :, rows], sinks, self.beta))
            start += size
        self.kept.append(sinks)
        parts.append(calibrate(p[:, :, start:], sinks, self.beta))  # what follows the prompt
        return torch.cat(parts, 2)


class TestACT(RuleCase):
    __test__ = True
    zero, small, large = 1.0, 0.6, 0.05
    prompt: tuple[int, ...] = ()

    def rule(self, strength: float, **where: Any) -> ab.rules.ACT:
        return ab.rules.ACT(beta=strength, threshold=THRESHOLD, **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        return Dense(strength, chunks=self.prompt)

    def oracle(self, subject: Subject, model: Any, strength: Any, *given: Any, **where: Any) -> Any:
        """Forwards that are longer than the prompt of the subject keep the sinks of the prompt."""
        length = subject.inputs["input_ids"].shape[1] if "input_ids" in subject.inputs else 0
        longer = bool(given) and given[0] is not None and given[0].shape[1] > length > 0
        self.prompt = (length,) if longer else ()
        return super().oracle(subject, model, strength, *given, **where)

    @torch.no_grad()
    def test_chunked_prefill_and_every_cache(self, decoder: Subject) -> None:
        """What is frozen when: chunks have the sinks by the rows so far, steps by all."""
        from transformers import DynamicCache, StaticCache

        ids = decoder.inputs["input_ids"]
        rule = self.rule(self.large, heads="all")
        assert not rule.row_local
        eager = decoder.eager()
        for chunks in ([9], [5, 4]):
            edit = DenseEdit(Dense(self.large, chunks=chunks))
            with rewritten(eager, [edit], torch.arange(ids.shape[1])[None]):
                wanted = decoder.run(eager, use_cache=False)
            for cache in (
                DynamicCache(config=decoder.model.config),
                StaticCache(config=decoder.model.config, max_cache_len=24),
            ):
                parts, start = [], 0
                with ab.steer(decoder.model, rule):
                    for size in [*chunks, 1, 1, 1, 1]:
                        part = ids[:, start : start + size]
                        out = decoder.model(input_ids=part, past_key_values=cache, use_cache=True)
                        parts.append(out.logits)
                        start += size
                assert off(torch.cat(parts, 1), wanted) < RELATIVE, (chunks, type(cache).__name__)


@torch.no_grad()
@pytest.mark.parametrize("spare", ["found", "first"])
@pytest.mark.parametrize("name", ["stories", "minilm"])
def test_relative_threshold_and_spared_sink(
    name: str, spare: str, request: pytest.FixtureRequest
) -> None:
    subject = make(name, request)
    rule = ab.rules.ACT(beta=0.2, alpha=2.0, spare=spare, heads="all")
    with ab.steer(subject.model, rule):
        found = subject.run()
    edit = DenseEdit(Dense(0.2, lambda where: 2.0 / where.shape[1], spare))
    eager = subject.eager()
    with rewritten(eager, [edit], torch.arange(13)[None]):
        wanted = subject.run(eager)
    assert off(found, wanted) < RELATIVE
    other = DenseEdit(
        Dense(0.2, lambda where: 2.0 / where.shape[1], {"found": "first"}.get(spare, "found"))
    )
    with rewritten(eager, [other], torch.arange(13)[None]):
        assert off(found, subject.run(eager)) > 30 * RELATIVE


@torch.no_grad()
def test_the_threshold_is_relative_to_the_tokens_of_each_row(
    request: pytest.FixtureRequest,
) -> None:
    subject = make("stories", request)
    ids = subject.inputs["input_ids"].clone()
    keep = torch.ones_like(ids)
    keep[1, :5] = 0
    rule = ab.rules.ACT(beta=0.1, alpha=1.5, heads="all")
    with ab.steer(subject.model, rule):
        both = subject.run(input_ids=ids, attention_mask=keep)
        alone = subject.run(input_ids=ids[1:, 5:])
    assert off(both[1, 5:], alone[0]) < RELATIVE


def test_defaults_are_the_published_ones() -> None:
    rule = ab.rules.ACT(heads="all")
    assert (rule.beta, rule.threshold, rule.alpha, rule.spare) == (0.4, 0.1, None, "found")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"beta": -0.1}, "beta must be from 0 to 1"),
        ({"beta": 1.1}, "beta must be from 0 to 1"),
        ({"beta": True}, "beta must be from 0 to 1"),
        ({"threshold": 0}, "threshold must be a finite number above 0"),
        ({"threshold": None}, "threshold must be a finite number above 0"),
        ({"alpha": -5.0}, "alpha must be a finite number above 0"),
        ({"spare": "last"}, "spare must be"),
    ],
)
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words):
        ab.rules.ACT(heads="all", **fields)


@torch.no_grad()
def test_decoding_alone_needs_the_prompt_inside(request: pytest.FixtureRequest) -> None:
    model = make("stories", request).model
    first = model(input_ids=tokens(1, 5), use_cache=True)
    rule = ab.rules.ACT(heads="all", phase="decode")
    with pytest.raises(ab.Refused, match="run the prefill inside"), ab.steer(model, rule):
        model(input_ids=tokens(1, 1), past_key_values=first.past_key_values, use_cache=True)


# Fitting ------------------------------------------------------------------------------------------


def prompts(count: int) -> list[dict[str, Tensor]]:
    ids = tokens(count, 12, seed=4)
    ids[:, 0] = 1
    return [{"input_ids": row[None]} for row in ids]


@torch.no_grad()
def test_fit_keeps_the_heads_that_raise_the_score(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Scores and choice are those of the dense route, head by head."""
    subject = make("stories", request)
    model, eager = subject.model, subject.eager()
    planted = ab.rules.ACT(heads={1: [2, 5], 2: [0]}, threshold=THRESHOLD, beta=0.0)
    examples = []
    with ab.steer(model, planted):
        for one in prompts(6):
            examples.append(ab.rules.Example(one, int(model(**one).logits[0, -1].argmax())))

    def by_hand(layer: int, heads: list[int]) -> tuple[float, float]:
        right, logs = 0.0, 0.0
        for example in examples:
            edit = DenseEdit(Dense(0.0), layers=[layer], heads=heads)
            with rewritten(eager, [edit], torch.arange(12)[None]):
                found = eager(**example.inputs).logits[0, -1].double().log_softmax(-1)
            right += float(int(found.argmax()) == example.answer)
            logs += float(found[example.answer])
        return right / len(examples), logs / len(examples)

    rule = ab.rules.ACT(heads=[0, 2, 5], layers=[1, 2], threshold=THRESHOLD, beta=0.0).fit(
        model, examples, by="log_probability", progress=False
    )
    record = rule.selected
    assert record is not None
    assert [s[:2] for s in record.scores] == [(1, 0), (1, 2), (1, 5), (2, 0), (2, 2), (2, 5)]
    for layer, head, right, logs in record.scores:
        assert (right, logs) == pytest.approx(by_hand(layer, [head]), abs=1e-4)
    better = tuple(s[:2] for s in record.scores if s[3] > record.plain[1])
    assert rule.heads == better
    assert 0 < len(better) < 6
    assert record.together[1] > record.plain[1]
    assert record.examples == 6
    recipe = ab.Recipe((rule,), "some/model")
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe


def test_fit_leaves_out_the_first_two_layers_and_the_last(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rich.progress import Progress

    steps: list[float] = []
    monkeypatch.setattr(Progress, "advance", lambda self, task, advance=1: steps.append(advance))
    model = make("stories", request).model
    example = ab.rules.Example(prompts(1)[0], 5)
    rule = ab.rules.ACT(heads=[1, 3], threshold=0.05).fit(model, [example], by="log_probability")
    assert rule.selected is not None
    assert {s[0] for s in rule.selected.scores} == {2, 3}  # of five layers
    assert len(steps) == 2 + len(rule.selected.scores)


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({}, {"examples": []}, "fit needs examples"),
        ({}, {"by": "luck"}, "by must be"),
        ({}, {"examples": [{"input_ids": tokens(1, 4)}]}, "has the answer None"),
        ({"phase": "decode"}, {}, "never acts"),
        ({"layers": [99]}, {}, "layer 99, but"),
        ({"threshold": 5.0}, {}, "none of 16 heads raises"),
    ],
)
def test_fit_refuses_in_one_sentence(
    fields: dict[str, Any],
    options: dict[str, Any],
    words: str,
    request: pytest.FixtureRequest,
) -> None:
    model = make("stories", request).model
    rule = ab.rules.ACT(**({"heads": "all"} | fields))
    given = {"examples": [ab.rules.Example(prompts(1)[0], 5)], "progress": False} | options
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        rule.fit(model, **given)
    assert "\n" not in str(caught.value)
    with pytest.raises(ab.AttnbiasError, match=r"model\.eval\(\)"):
        ab.rules.ACT(heads="all").fit(model.train(), [ab.rules.Example(prompts(1)[0], 5)])
