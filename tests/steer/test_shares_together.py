"""Reallocations of several rules in one context: each sees the shares after the one before."""

from __future__ import annotations

import pytest
import torch

import attnbias as ab
from attnbias.hub.prompt import Prompt
from tests.cases.rule import RELATIVE, off
from tests.steer.dense import DenseEdit, rewritten
from tests.steer.models import make
from tests.steer.test_act import Dense, TestACT
from tests.steer.test_found_in_the_middle import TestFoundInTheMiddle
from tests.steer.test_split_softmax import TestSplitSoftmax

CASES = {"found": TestFoundInTheMiddle(), "act": TestACT(), "split": TestSplitSoftmax()}
del TestACT, TestFoundInTheMiddle, TestSplitSoftmax  # collected in their own files


@torch.no_grad()
@pytest.mark.parametrize("order", [("found", "act", "split"), ("split", "act", "found")])
@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_in_order(name: str, order: tuple[str, ...], request: pytest.FixtureRequest) -> None:
    subject = make(name, request)
    rules = [CASES[one].rule(0.3, heads="all") for one in order]
    eager = subject.eager()

    def dense(names: tuple[str, ...]) -> torch.Tensor:
        edits = [DenseEdit(Dense(0.3) if n == "act" else CASES[n].dense(0.3)) for n in names]
        with rewritten(eager, edits, torch.arange(13)[None]):
            return subject.run(eager)

    with ab.steer(subject.model, *rules):
        together = subject.run()
    with ab.steer(subject.model, rules[0]), ab.steer(subject.model, *rules[1:]):
        nested = subject.run()
    assert off(together, dense(order)) < RELATIVE
    assert off(nested, together) < RELATIVE
    assert off(together, dense(order[::-1])) > 30 * RELATIVE
    assert off(together, dense(order[:2])) > 30 * RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
def test_all_four_on_a_prompt_with_an_image(name: str, request: pytest.FixtureRequest) -> None:
    """Prepared, under ``generate`` and in bfloat16; the model is restored."""
    subject = make(name, request)
    half = {k: len(v) // 2 for k, v in subject.inputs.items()}
    inputs = {k: v[: half[k]] for k, v in subject.inputs.items()}
    spans = {"image": (2, 6), "document 0": (7, 9), "document 1": (9, 13), "system": (0, 2)}
    given = Prompt(inputs, {**spans, "generated": (16, None)}, [], "")
    where = {"heads": "all", "towers": ("text",)}
    rules = (
        ab.rules.FoundInTheMiddle(dummy=(44,), temperature=0.01, **where),
        ab.rules.VAR(dims=(1, 2), tau=1.4, start=0, **where),
        ab.rules.ACT(**where),
        ab.rules.SplitSoftmax(power=0.5, **where),
    )
    plain = subject.model(**inputs).logits
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    with ab.steer(subject.model, *rules, prompt=given):
        steered = subject.model(**inputs).logits
        ids = subject.model.generate(**inputs, **options)
    assert off(plain, steered) > 30 * RELATIVE
    assert torch.equal(subject.model(**inputs).logits, plain)
    assert int(ids[0, 16]) == int(steered[0, -1].argmax())
    low = subject.model.to(torch.bfloat16)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with ab.steer(low, *rules[:3], prompt=Prompt(inputs, given.spans, [], "")):
        found = low(**inputs).logits
    assert found.dtype == torch.bfloat16
    assert bool(found.isfinite().all())
    ranking = ab.rules.rank_documents(
        low, Prompt(inputs, spans, [], ""), dummy=[44], towers=("text",)
    )
    assert ranking.depth == 3
