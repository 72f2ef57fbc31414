"""Rules whose bias is the same in all layers: that of a decoded token is made once."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Rule, engine
from tests.steer.models import Subject, make

R = ab.rules
HEADS: Any = {0: (0, 1), 1: (2,)}  # other heads in each layer
RULES: dict[str, Rule] = {
    "KeyShift": R.KeyShift(keys=[0, 3], amount=1.5, heads="all"),
    "KeyShift, heads": R.KeyShift(keys="prompt", amount=1.5, heads=HEADS),
    "ZeroTuning": R.ZeroTuning(factor=0.3, heads="all"),
    "PASTA": R.PASTA(keys=("prompt",), heads=HEADS, scope="all"),
    "LocoRE": R.LocoRE(heads="all", beta=0.8),
}
SPANS = {"prompt": (1, 4), "generated": (6, None)}


@pytest.fixture(params=["stories", "gpt_oss", "mistral"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


@torch.no_grad()
def decoded(subject: Subject, rules: tuple[Rule, ...]) -> Tensor:
    """Scores of four tokens after the prompt."""
    model, ids = subject.model, subject.inputs["input_ids"][:1, :6]
    scores = []
    with ab.steer(model, *rules, spans=SPANS):
        found = model(input_ids=ids, use_cache=True)
        for _ in range(4):
            token = found.logits[:, -1:].argmax(-1)
            found = model(input_ids=token, past_key_values=found.past_key_values, use_cache=True)
            scores.append(found.logits)
    return torch.cat(scores, 1)


def test_every_rule_that_says_so_is_tested() -> None:
    named = {name for name in R.__all__ if getattr(getattr(R, name), "layers_alike", False)}
    assert named == {name.split(",")[0] for name in RULES}


@pytest.mark.parametrize("name", [*RULES, "all"])
def test_is_what_each_layer_makes_itself(subject: Subject, name: str) -> None:
    rules = tuple(RULES.values()) if name == "all" else (RULES[name],)
    found = decoded(subject, rules)
    with mock.patch.object(engine, "_alike", return_value=None):
        assert torch.equal(found, decoded(subject, rules))
    assert (
        found - decoded(subject, (R.KeyShift(keys=[0], amount=1e-9, heads="all"),))
    ).abs().max() > 1e-3


def test_is_made_once(request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    layers = subject.model.config.num_hidden_layers
    assert layers > 1
    with mock.patch.object(R.KeyShift, "bias", autospec=True, side_effect=R.KeyShift.bias) as made:
        decoded(subject, (RULES["KeyShift"],))
    assert made.call_count == layers + 4  # the prompt in each layer, each token once
