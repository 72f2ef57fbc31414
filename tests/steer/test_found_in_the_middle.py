from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.hub.prompt import Prompt
from attnbias.steer import Range
from tests.cases.rule import RELATIVE, RuleCase, off
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import make, tokens

PLACES = (range(0, 1), range(1, 3), range(3, 4))
ATTENTION, BIAS = (0.4, 0.3, 0.5), (0.3, 0.1, 0.45)
TEMPERATURE = 0.1


def rescaled(p: Tensor, groups: Tensor, rows: Tensor, alpha: Tensor, strength: float) -> Tensor:
    """The published rescaling, document by document. groups: (batch, keys), 0 for none."""
    numbers = torch.arange(1, 1 + len(alpha))
    member = (groups[:, :, None] == numbers).double()[:, None]  # (b, 1, keys, K)
    sizes = member.sum(2, keepdim=True).clamp(min=1)
    mean = p @ member / sizes  # (b, h, q, K)
    seen = p @ member > 1e-30
    factor = torch.where(seen, alpha / torch.where(seen, mean, 1.0), 0.0)
    new = p * (factor @ member.mT)
    inside = member.sum(-1)[:, :, None]
    whole = new.sum(-1, keepdim=True)
    on = rows[:, None, :, None] & (whole > 0)
    new = new * (p * inside).sum(-1, keepdim=True) / torch.where(on, whole, 1.0)
    mixed = (1 - strength) * p + strength * torch.where(inside > 0, new, p)
    return torch.where(on, mixed, p)


class TestFoundInTheMiddle(RuleCase):
    __test__ = True
    zero, small, large = 0.0, 0.4, 1.0

    def rule(self, strength: float, **where: Any) -> ab.rules.FoundInTheMiddle:
        documents = tuple(Range(one.start, one.stop) for one in PLACES)
        ranking = ab.rules.Ranking(documents, (1, 2, 1), ATTENTION, BIAS, 5)
        return ab.rules.FoundInTheMiddle(
            ranking=ranking, temperature=TEMPERATURE, last=1.0, strength=strength, **where
        )

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        relevance = torch.tensor(ATTENTION).double() - torch.tensor(BIAS).double()
        alpha = (relevance / TEMPERATURE).softmax(-1)

        def rewrite(found: Map) -> Tensor:
            p, where = found.probabilities, found.positions
            groups = torch.zeros_like(where)
            for number, one in enumerate(PLACES, 1):
                groups[(where >= one.start) & (where < one.stop)] = number
            if p.shape[2] == p.shape[3]:
                rows = where > 3
            else:  # a step, or another tower's keys
                rows = torch.ones(1, p.shape[2], dtype=torch.bool)
            return rescaled(p, groups, rows, alpha, strength)

        return rewrite

    def test_ranking_by_eager_maps(self, request: pytest.FixtureRequest) -> None:
        subject = make("stories", request)
        eager = subject.eager()
        given = prompt()
        found = ab.rules.rank_documents(subject.model, given, dummy=DUMMY)
        assert found.documents == ("document 0", "document 1", "document 2")
        assert found.depth == 5
        assert found.sizes == (3, 5, 2)
        ids = given.inputs["input_ids"]
        assert found.attention == pytest.approx(by_hand(eager, ids), rel=1e-4)
        for number, (start, stop) in enumerate(list(SPANS.values())[:3]):
            filled = ids.clone()
            for place in range(start, stop):
                filled[0, place] = DUMMY[(place - start) % 3]
            assert found.bias[number] == pytest.approx(by_hand(eager, filled)[number], rel=1e-4)
        assert found.relevance == pytest.approx(
            [a - b for a, b in zip(found.attention, found.bias, strict=True)]
        )
        order = sorted(range(3), key=lambda k: found.relevance[k], reverse=True)
        assert found.order == tuple(f"document {k}" for k in order)


# The ranking --------------------------------------------------------------------------------------

DUMMY = (44, 45, 46)
SPANS = {"document 0": (2, 5), "document 1": (6, 11), "document 2": (11, 13), "question": (13, 16)}


def prompt(seed: int = 5) -> Prompt:
    ids = tokens(1, 16, seed=seed)
    ids[:, 0] = 1
    return Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, SPANS, [], "")


@torch.no_grad()
def by_hand(model: Any, ids: Tensor) -> list[float]:
    """Mean attention per token of each document, from eager maps."""
    maps = torch.stack(model(input_ids=ids, output_attentions=True).attentions).double()
    row = maps[:, 0, :, -1].mean((0, 1))
    return [float(row[a:b].mean()) for a, b in list(SPANS.values())[:3]]


def test_a_padded_prompt_is_ranked_as_without_padding(request: pytest.FixtureRequest) -> None:
    model = make("stories", request).model
    given = prompt()
    ids = given.inputs["input_ids"]
    padded = {
        "input_ids": torch.nn.functional.pad(ids, (3, 0)),
        "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (3, 0)),
    }
    plain = ab.rules.rank_documents(model, given, dummy=DUMMY)
    found = ab.rules.rank_documents(model, Prompt(padded, SPANS, [], ""), dummy=DUMMY)
    assert found.attention == pytest.approx(plain.attention, rel=1e-4)
    assert found.bias == pytest.approx(plain.bias, rel=1e-4)


@torch.no_grad()
def test_steer_prepares_the_rule_for_its_prompt(request: pytest.FixtureRequest) -> None:
    """Prefill and steps under ``generate`` equal whole forwards of the dense rewrite."""
    subject = make("stories", request)
    model, eager, given = subject.model, subject.eager(), prompt()
    rule = ab.rules.FoundInTheMiddle(dummy=DUMMY, temperature=TEMPERATURE / 50, heads="all")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    plain = model.generate(**given.inputs, **options)
    with ab.steer(model, rule, prompt=given):
        logits = model(**given.inputs).logits
        found = model.generate(**given.inputs, **options)
    ranking = ab.rules.rank_documents(model, given, dummy=DUMMY)
    alpha = (torch.tensor(ranking.relevance).double() / (TEMPERATURE / 50)).softmax(-1)

    def rewrite(seen: Map) -> Tensor:
        groups = torch.zeros_like(seen.positions)
        for number, (start, stop) in enumerate(list(SPANS.values())[:3], 1):
            groups[:, start:stop] = number
        return rescaled(seen.probabilities, groups, seen.positions > 12, alpha, 1.0)

    ids = given.inputs["input_ids"]
    for number in range(8):
        places = torch.arange(ids.shape[1])[None]
        with rewritten(eager, [DenseEdit(rewrite, layers=[2, 3, 4])], places):
            wanted = eager(input_ids=ids).logits
        if not number:
            assert off(logits, wanted) < RELATIVE
            assert off(model(**given.inputs).logits, wanted) > 30 * RELATIVE
        ids = torch.cat([ids, wanted[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)
    assert not torch.equal(found, plain)


@torch.no_grad()
def test_each_prompt_is_measured_anew(request: pytest.FixtureRequest) -> None:
    model = make("stories", request).model
    rule = ab.rules.FoundInTheMiddle(dummy=DUMMY, heads="all")
    first, second = (rule.prepare(model, prompt(seed)) for seed in (1, 2))
    assert first.ranking != second.ranking
    assert first.prepare(model, prompt(2)) == second
    assert rule.ranking is None


@torch.no_grad()
def test_spans_given_beside_a_prompt_come_first(request: pytest.FixtureRequest) -> None:
    model, given = make("stories", request).model, prompt()
    shift = ab.rules.KeyShift(keys=["question", "other"], amount=2.0, heads="all")
    with ab.steer(model, shift, prompt=given, spans={"other": (0, 1)}):
        found = model(**given.inputs).logits
    with ab.steer(model, shift, spans={"other": (0, 1), "question": (13, 16)}):
        assert torch.equal(model(**given.inputs).logits, found)
    with ab.steer(model, shift, prompt=given, spans={"other": (0, 1), "question": (13, 14)}):
        assert not torch.equal(model(**given.inputs).logits, found)


def test_document_mass_is_conserved_and_uniform_relevance_levels() -> None:
    """Even relevance gives every document the same attention per token."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(1, 2, 6, 9, generator=generator, dtype=torch.float64)
    p = p / p.sum(-1, keepdim=True)
    groups = torch.tensor([[0, 1, 1, 1, 2, 2, 0, 3, 0]])
    masses = torch.stack([p[..., groups[0] == k].sum(-1) for k in range(4)], -1)
    ranking = ab.rules.Ranking((Range(1, 4), Range(4, 6), 7), (3, 2, 1), (0.3,) * 3, (0.1,) * 3, 2)
    rule = ab.rules.FoundInTheMiddle(ranking=ranking, heads="all")

    class Site:
        key_positions = torch.arange(9)[None]
        query_positions = torch.arange(9, 15)[None]

        class site:
            kind = "self"

        def where(self, keys: Any) -> Tensor:
            one = keys[0] if isinstance(keys[0], Range) else Range(keys[0], keys[0] + 1)
            return (self.key_positions >= one.start) & (self.key_positions < one.stop)

    new = rule.reallocate(Site(), masses)  # type: ignore[arg-type]
    assert new is not None
    torch.testing.assert_close(new[..., 1:].sum(-1), masses[..., 1:].sum(-1))
    assert torch.equal(new[..., 0], masses[..., 0])
    per_token = new[..., 1:] / torch.tensor([3.0, 2.0, 1.0])
    torch.testing.assert_close(per_token, per_token[..., :1].expand(-1, -1, -1, 3))


def test_what_is_missing_is_refused_with_the_line_to_run(
    request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model, given = make("stories", request).model, prompt()
    bare = ab.rules.FoundInTheMiddle(heads="all")
    with pytest.raises(ab.Refused, match=r"dummy=tokenizer\("), ab.steer(model, bare, prompt=given):
        pass
    rule = ab.rules.FoundInTheMiddle(heads="all", dummy=DUMMY)
    with pytest.raises(ab.Refused, match=r"prompt=ab\.prompt\("), ab.steer(model, rule):
        pass
    ab.Recipe((rule,), "model").save(tmp_path / "recipe.json")  # what a prompt gives comes later
    assert ab.Recipe.load(tmp_path / "recipe.json").rules == (rule,)
    with (
        pytest.raises(ab.AttnbiasError, match=r"what ab\.prompt\(tokenizer, \.\.\.\) returns"),
        ab.steer(model, rule, prompt="text"),  # type: ignore[arg-type]
    ):
        pass
    none = Prompt(given.inputs, {"question": (0, 3)}, [], "")
    with pytest.raises(ab.AttnbiasError, match="names no documents"):
        rule.prepare(model, none)
    far = ab.rules.FoundInTheMiddle(heads="all", dummy=DUMMY, documents=[range(40, 50)])
    with pytest.raises(ab.AttnbiasError, match="has no token in this prompt"):
        far.prepare(model, given)
    with pytest.raises(ab.AttnbiasError, match="dummy must be token ids"):
        ab.rules.rank_documents(model, given, dummy="dummy")  # type: ignore[arg-type]
    with pytest.raises(ab.AttnbiasError, match=r"model\.eval\(\)"):
        rule.prepare(model.train(), given)


def test_defaults_are_the_published_ones() -> None:
    rule = ab.rules.FoundInTheMiddle(heads="all", dummy=DUMMY)
    assert (rule.temperature, rule.last, rule.strength) == (5e-5, 0.5, 1.0)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": float("inf")}, "temperature must be above 0"),
        ({"last": 0}, "last must be above 0 and at most 1"),
        ({"last": 1.5}, "last must be above 0 and at most 1"),
        ({"strength": -0.1}, "strength must be from 0 to 1"),
        ({"strength": 1.1}, "strength must be from 0 to 1"),
        ({"dummy": (-1,)}, "dummy must hold token ids"),
    ],
)
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words):
        ab.rules.FoundInTheMiddle(**({"heads": "all", "dummy": DUMMY} | fields))
