from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RuleCase
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import make, tokens

Example = ab.rules.Example


class TestZeroTuning(RuleCase):
    __test__ = True
    zero, small, large = 1.0, 0.7, 8.0

    def rule(self, strength: float, **where: Any) -> ab.rules.ZeroTuning:
        return ab.rules.ZeroTuning(factor=strength, **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        """The published form: scale the weight of token 0 and divide by D."""

        def rewrite(found: Map) -> Tensor:
            p = found.probabilities
            first = (found.positions == 0)[:, None, None, :]
            divisor = 1 + (strength - 1) * (p * first).sum(-1, keepdim=True)
            return torch.where(first, strength * p, p) / divisor

        return rewrite


def test_unfitted_is_refused_with_the_line_to_run(model: Any) -> None:
    rule = ab.rules.ZeroTuning(heads="all")
    with pytest.raises(ab.Refused, match=r"\.fit\(model, examples\)"), ab.steer(model, rule):
        pass
    with pytest.raises(ab.Refused, match=r"\.fit\(model, examples\)"):
        ab.Recipe((rule,), "model")


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_bad_factors(factor: Any) -> None:
    with pytest.raises(ab.AttnbiasError, match="above 0"):
        ab.rules.ZeroTuning(factor=factor, heads="all")


# Fitting ------------------------------------------------------------------------------------------


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Any:
    return make("stories", request).model


def prompts(count: int = 5) -> list[dict[str, Tensor]]:
    ids = tokens(count, 10, seed=9)
    ids[:, 0] = 1
    return [{"input_ids": row[None]} for row in ids]


@torch.no_grad()
def labelled(model: Any, rule: ab.steer.Rule) -> list[Any]:
    """Answers that a steered model gives: there is something to find."""
    with ab.steer(model, rule):
        answers = [int(model(**one).logits[0, -1].argmax()) for one in prompts()]
    return [Example(one, answer) for one, answer in zip(prompts(), answers, strict=True)]


@torch.no_grad()
def scores(
    model: Any, examples: list[Any], factor: float, heads: Any
) -> tuple[float, float, float]:
    """Accuracy, mean log-probability and mean entropy by the dense route."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    right, log_probability, entropy = 0.0, 0.0, 0.0
    with rewritten(eager, [DenseEdit(TestZeroTuning().dense(factor), heads=heads)]):
        for example in examples:
            logs = eager(**example.inputs).logits[0, -1].double().log_softmax(-1)
            right += float(int(logs.argmax()) == example.answer)
            log_probability += float(logs[example.answer])
            entropy -= float((logs.exp() * logs).sum())
    count = len(examples)
    return right / count, log_probability / count, entropy / count


def test_fit_finds_what_was_planted(model: Any) -> None:
    """Scores, head groups and the choice are those of the dense route, search by search."""
    examples = labelled(model, ab.rules.ZeroTuning(factor=5.0, heads=[0, 2, 3, 6]))
    weights = [p.clone() for p in model.parameters()]
    rule = ab.rules.ZeroTuning(heads="all").fit(model, examples, progress=False)
    fitted = rule.fitted
    assert fitted is not None
    base = scores(model, examples, 1.0, range(8))[:2]
    down, up = [], []
    for head in range(8):
        low, high = (scores(model, examples, f, [head])[:2] for f in (0.5, 2.0))
        if high > base and high >= low:
            up.append(head)
        elif low > base:
            down.append(head)
    assert (fitted.down, fitted.up) == (tuple(down), tuple(up))
    assert rule.heads == max(fitted.up, fitted.down, key=len)
    assert fitted.factors == (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)
    for factor, score in zip(fitted.factors, fitted.scores, strict=True):
        assert score == pytest.approx(scores(model, examples, factor, rule.heads)[:2], abs=1e-4)
    assert max(fitted.scores) == fitted.scores[fitted.factors.index(rule.factor)]
    assert max(fitted.scores) > fitted.scores[0]  # there was something to gain, and it was found
    assert fitted.examples == 5
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    with ab.steer(model, rule):  # ready
        model(**prompts()[0])


def test_fit_by_entropy_needs_no_labels(model: Any) -> None:
    rule = ab.rules.ZeroTuning(heads=[5, 1, 4]).fit(
        model, prompts(), by="entropy", grid=(0.5, 1.0, 2.0), progress=False
    )
    assert rule.fitted is not None
    assert rule.factor is not None
    examples = [Example(one, 0) for one in prompts()]
    plain = scores(model, examples, 1.0, [0])[2]
    found = scores(model, examples, rule.factor, rule.heads)[2]
    assert found < plain - 1e-3
    assert -rule.fitted.scores[0][0] == pytest.approx(plain, abs=1e-4)
    assert -max(rule.fitted.scores)[0] == pytest.approx(found, abs=1e-4)
    assert set(rule.heads) <= {1, 4, 5}


def test_fit_never_does_worse_than_the_plain_model(model: Any) -> None:
    """With the model's own answers as labels nothing can gain accuracy; the result keeps it."""
    examples = labelled(model, ab.rules.ZeroTuning(factor=1.0, heads="all"))
    rule = ab.rules.ZeroTuning(heads=[0, 1]).fit(model, examples, grid=(0.5, 2.0), progress=False)
    assert rule.fitted is not None
    assert rule.fitted.scores[rule.fitted.factors.index(rule.factor)] >= rule.fitted.scores[0]
    assert rule.fitted.scores[0][0] == 1.0


def test_choices_and_padding_are_looked_at(model: Any) -> None:
    """The answer is read after the last real token, among the choices alone."""
    one = prompts()[0]["input_ids"]
    padded = torch.cat([one, torch.zeros(1, 3, dtype=torch.long)], 1)
    mask = torch.tensor([[1] * 10 + [0] * 3])
    examples = [Example({"input_ids": padded, "attention_mask": mask}, 7, (7, 9))]
    rule = ab.rules.ZeroTuning(heads=[0]).fit(model, examples, grid=(2.0,), progress=False)
    with torch.no_grad():
        logs = model(input_ids=one).logits[0, -1, [7, 9]].double().log_softmax(-1)
    assert rule.fitted is not None
    assert rule.fitted.scores[0] == pytest.approx((float(logs[0] > logs[1]), float(logs[0])), 1e-4)


def test_fit_shows_its_progress(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    steps: list[float] = []
    monkeypatch.setattr(Progress, "advance", lambda self, task, advance=1: steps.append(advance))
    ab.rules.ZeroTuning(heads=[0, 1]).fit(model, prompts(1), by="entropy", grid=(0.5, 2.0))
    assert 5 <= len(steps) <= 7  # plain, two heads down and up, at most the whole grid


@pytest.mark.parametrize(
    ("fields", "options", "words"),
    [
        ({}, {"examples": []}, "fit needs examples"),
        ({}, {"examples": ["text"]}, "fit needs examples.*got str"),
        ({}, {"by": "luck"}, "by must be"),
        ({}, {"grid": ()}, "grid must hold"),
        ({}, {"grid": (0.0,)}, "grid must hold"),
        ({}, {"profile": (2.0, 0.5)}, "profile must be"),
        ({"heads": [(0, 1)]}, {}, "profiles each head number"),
        ({"layers": [70]}, {}, "layer 70, but"),
        ({"phase": "decode", "heads": [0]}, {}, "never acts"),
        ({}, {"by": "accuracy"}, "example 0 has the answer None"),
    ],
)
def test_fit_refuses_in_one_sentence(
    model: Any, fields: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    rule = ab.rules.ZeroTuning(**({"heads": "all"} | fields))
    given = {"examples": prompts(1), "by": "entropy", "progress": False} | options
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        rule.fit(model, **given)
    assert "\n" not in str(caught.value)


def test_fit_refuses_a_model_in_training(model: Any) -> None:
    with pytest.raises(ab.AttnbiasError, match=r"model\.eval\(\)"):
        ab.rules.ZeroTuning(heads="all").fit(model.train(), prompts(1), by="entropy")


def test_a_fitted_rule_survives_a_recipe(model: Any, tmp_path: Path) -> None:
    rule = ab.rules.ZeroTuning(heads=[0, 1]).fit(
        model, prompts(2), by="entropy", grid=(0.5, 2.0), progress=False
    )
    recipe = ab.Recipe.of(model, rule)
    assert recipe.model.endswith("stories260K-hf")
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
