"""`steer` under `generate`: beams, sampling, several sequences, named spans per row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import padded
from tests.steer.dense import DenseEdit, Map, multiply, rewritten
from tests.steer.models import Subject, make

SPANS = {"document": [(2, 5), (5, 8)]}
OPTIONS = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """Two prompts of different lengths, padded on the left."""
    subject = make("stories", request)
    inputs, _, _ = padded(subject, "left")
    del inputs["position_ids"]
    subject.inputs = inputs
    return subject


def per_row(found: Map) -> Tensor:
    """The spans of the two prompts, each repeated in place for its beams or samples."""
    batch = found.positions.shape[0]
    rows = torch.arange(batch)[:, None] // (batch // 2)
    start, stop = torch.where(rows == 0, 2, 5), torch.where(rows == 0, 5, 8)
    return (found.positions >= start) & (found.positions < stop)


def swapped(found: Map) -> Tensor:
    """The wrong repetition: prompts in turn."""
    batch = found.positions.shape[0]
    rows = torch.arange(batch)[:, None] % 2
    start, stop = torch.where(rows == 0, 2, 5), torch.where(rows == 0, 5, 8)
    return (found.positions >= start) & (found.positions < stop)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.3},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 0.8},
        {"do_sample": True, "num_beams": 3},
        {"do_sample": False},
        {"do_sample": False, "use_cache": False},
        {"num_beams": 4, "cache_implementation": "static", "disable_compile": True},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: " ".join(options),
)
def test_spans_per_row_stay_with_their_prompt(subject: Subject, options: dict[str, Any]) -> None:
    """Tokens equal those of the dense rewrite, in which each prompt's rows keep its own span."""
    if "prompt_lookup_num_tokens" in options:  # takes one row
        subject.inputs = {name: value[:1] for name, value in subject.inputs.items()}
        spans: dict[str, Any] = {"document": (2, 5)}
    else:
        spans = SPANS
    rule = ab.rules.KeyShift(keys="document", amount=4.0, heads=[0, 1, 5, 6])

    def generate(model: Any) -> Tensor:
        torch.manual_seed(11)
        kept = dict(options)
        if model is eager:  # the dense route is held against the plain cache
            kept.pop("cache_implementation", None)
        found: Tensor = model.generate(**subject.inputs, **OPTIONS, **kept)
        return found

    eager = subject.eager()
    plain = generate(subject.model)
    with ab.steer(subject.model, rule, spans=spans):
        found = generate(subject.model)
    factor = float(torch.tensor(4.0).double().exp())

    def rows(found: Map) -> Tensor:
        if found.positions.shape[0] == 1:
            return (found.positions >= 2) & (found.positions < 5)
        return per_row(found)

    with rewritten(eager, [DenseEdit(multiply(rows, factor), heads=[0, 1, 5, 6])]):
        wanted = generate(eager)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)
    if "num_beams" in options or "num_return_sequences" in options:
        with rewritten(eager, [DenseEdit(multiply(swapped, factor), heads=[0, 1, 5, 6])]):
            assert not torch.equal(generate(eager), wanted)


@torch.no_grad()
def test_the_generated_span_grows(subject: Subject) -> None:
    """A span without an end holds every token written so far."""
    inputs = {name: value[:1] for name, value in subject.inputs.items()}
    length = inputs["input_ids"].shape[1]
    rule = ab.rules.KeyShift(keys="generated", amount=3.0, heads="all")
    with ab.steer(subject.model, rule, spans={"generated": (length, None)}):
        found = subject.model.generate(**inputs, **OPTIONS, do_sample=False)
    eager = subject.eager()
    edit = multiply(lambda m: m.positions >= length, float(torch.tensor(3.0).double().exp()))
    with rewritten(eager, [DenseEdit(edit)]):
        wanted = eager.generate(**inputs, **OPTIONS, do_sample=False)
    assert torch.equal(found, wanted)
    plain = subject.model.generate(**inputs, **OPTIONS, do_sample=False)
    assert torch.equal(found[:, : length + 1], plain[:, : length + 1])  # nothing written yet
    assert not torch.equal(found, plain)


@torch.no_grad()
def test_encoder_decoder_with_beams(request: pytest.FixtureRequest) -> None:
    """Cross-attention to a span of the source, under beams."""
    subject = make("bart cross", request)
    inputs = {"input_ids": subject.inputs["input_ids"]}
    options = {"max_new_tokens": 8, "num_beams": 3, "forced_eos_token_id": None}
    rule = ab.rules.KeyShift(keys="document", amount=4.0, heads="all", towers=["cross"])
    with ab.steer(subject.model, rule, spans=SPANS):
        found = subject.model.generate(**inputs, **options)
    eager = subject.eager()
    factor = float(torch.tensor(4.0).double().exp())

    def rows(one: Map) -> Tensor:
        length = one.probabilities.shape[-1]
        batch = one.probabilities.shape[0]
        return per_row(Map(one.probabilities, one.rest, torch.arange(length).expand(batch, -1)))

    with rewritten(eager, [DenseEdit(multiply(rows, factor), towers=["cross"])]):
        wanted = eager.generate(**inputs, **options)
    assert torch.equal(found, wanted)
    assert not torch.equal(found, subject.model.generate(**inputs, **options))
