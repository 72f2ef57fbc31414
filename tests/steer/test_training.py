"""`steer` with gradient checkpointing, PEFT, `torch.compile`, dropout and a second thread."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from tests.cases.rule import RELATIVE, off
from tests.steer.models import Subject, make
from tests.steer.sample_rules import SetShare


def rules() -> tuple[ab.steer.Rule, ...]:
    return (
        ab.rules.KeyShift(keys=[1, 4], amount=2.0, heads=[0, 3]),
        SetShare(keys=[0, 2], share=0.6, heads=[1, 2], layers=[0, 1]),
    )


def gradients(model: nn.Module, inputs: dict[str, Tensor], *edits: Any) -> dict[str, Tensor]:
    model.zero_grad()
    if edits:
        with ab.steer(model, *edits):
            model(**inputs, use_cache=False).logits.square().mean().backward()
    else:
        model(**inputs, use_cache=False).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    size = max(float(g.abs().max()) for g in wanted.values())
    return max(float((found[name] - g).abs().max()) for name, g in wanted.items()) / size


@pytest.fixture(params=["stories", "mistral"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return make(request.param, request)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(subject: Subject, reentrant: bool) -> None:
    """The recomputation in backward is edited too: gradients equal those without it."""
    model = subject.model.train()
    wanted = gradients(model, subject.inputs, *rules())
    plain = gradients(model, subject.inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:  # needs an input with a gradient
        model.enable_input_require_grads()
    found = gradients(model, subject.inputs, *rules())
    assert worst(found, wanted) < 1e-6
    assert worst(plain, wanted) > 1e-3


def test_peft(subject: Subject) -> None:
    """An adapter around the model: sites are found inside, the merged model agrees."""
    import peft

    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(subject.model), config).eval()
    plain = subject.run(model)
    with ab.steer(model, *rules()):
        found = subject.run(model)
    assert torch.equal(subject.run(model), plain)
    assert off(plain, found) > 30 * RELATIVE
    trained = gradients(model.train(), subject.inputs, *rules())
    assert trained
    assert all("lora" in name for name in trained)
    merged = model.eval().merge_and_unload()
    with ab.steer(merged, *rules()), torch.no_grad():
        assert off(subject.run(merged), found) < RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("first", ["inside", pytest.param("outside", marks=pytest.mark.slow)])
def test_compile(first: str, request: pytest.FixtureRequest) -> None:
    """A compiled model, first run inside or outside the context, gives the edited output."""
    subject = make("mistral", request)
    plain = subject.run()
    with ab.steer(subject.model, *rules()):
        wanted = subject.run()
    torch._dynamo.reset()
    compiled = torch.compile(subject.model, backend="eager")
    if first == "outside":
        assert off(subject.run(compiled), plain) < RELATIVE
    with ab.steer(compiled, *rules()):
        found = subject.run(compiled)
    assert off(found, wanted) < RELATIVE
    assert off(plain, wanted) > 30 * RELATIVE
    assert off(subject.run(compiled), plain) < RELATIVE
    torch._dynamo.reset()


def test_dropout_is_refused_only_where_a_call_is_edited(request: pytest.FixtureRequest) -> None:
    subject = make("mistral", request)
    for module in subject.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.25
    model = subject.model.train()
    shift = ab.rules.KeyShift(keys=[0], amount=1.0, heads="all")
    with pytest.raises(ab.Refused, match=r"dropout 0.25.*model\.eval\(\)"), ab.steer(model, shift):
        subject.run()
    for unedited in (
        ab.rules.KeyShift(keys=[0], amount=0.0, heads="all"),
        ab.rules.KeyShift(keys=[60], amount=1.0, heads="all"),
        ab.rules.KeyShift(keys=[0], amount=1.0, heads="all", phase="decode"),
    ):
        torch.manual_seed(1)
        wanted = subject.run()
        torch.manual_seed(1)
        with ab.steer(model, unedited):
            assert torch.equal(subject.run(), wanted)
    with ab.steer(model.eval(), shift):
        subject.run()


def test_a_second_thread_is_refused(subject: Subject) -> None:
    shift = ab.rules.KeyShift(keys=[0], amount=1.0, heads="all")
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with ab.steer(subject.model, shift):
                pass
        except ab.Refused as error:
            caught.append(error)

    with ab.steer(subject.model, shift):
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
    assert len(caught) == 1
