"""Entering, nesting, failing and leaving: what a context does to a model and takes back."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from attnbias import Refused
from attnbias.hub import attach, sites
from tests.hub.models import (
    FAMILIES,
    Push,
    See,
    build,
    inputs_of,
    outputs,
    same,
    state,
    unchanged,
)

TRIED = ["llama", "gemma3", "gpt2", "gpt_oss", "bert", "vit", "bart", "t5", "clip"]


def _run(model: nn.Module, name: str, **options: Any) -> Any:
    with torch.no_grad():
        return model(**inputs_of(name), **options)


def _refused(model: nn.Module, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence), attach(model, See()):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", [name for name in TRIED if name in FAMILIES])
def test_everything_is_put_back(name: str) -> None:
    model = build(name)
    plain = _run(model, name)
    before = state(model)
    with attach(model, Push()):
        edited = _run(model, name)
        assert state(model)["modules"] != before["modules"]
    assert unchanged(before, state(model))
    # The edit was real, and it is gone.
    assert not same(plain, edited)
    assert same(plain, _run(model, name))


@pytest.mark.parametrize("name", ["llama", "bart", "vit"])
def test_an_exception_in_any_layer(name: str) -> None:
    model = build(name)
    plain = _run(model, name)
    before = state(model)
    for site in sites(model):
        module = model.get_submodule(site.name)

        def fail(*_: Any) -> None:
            raise RuntimeError("broken layer")

        handle = module.register_forward_pre_hook(fail)
        see = See()
        with pytest.raises(RuntimeError, match="broken layer"), attach(model, see):
            _run(model, name)
        handle.remove()
        assert (see.began, see.ended) == ([0], [])
        assert unchanged(before, state(model))
    # Caught inside: the context goes on, and counts the next forward as the next one.
    see = See()
    with attach(model, see):
        handle = model.get_submodule(sites(model)[-1].name).register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="broken layer"):
            _run(model, name)
        handle.remove()
        ours = _run(model, name)
    assert same(plain, ours)
    assert (see.began, see.ended) == ([0, 1], [1])
    assert unchanged(before, state(model))


@pytest.mark.parametrize("place", ["begin_forward", "see", "end_forward", "body", "compute"])
def test_an_exception_in_a_participant(place: str) -> None:
    class Broken(See):
        def begin_forward(self, forward: int) -> None:
            if place == "begin_forward":
                raise KeyError(place)

        def end_forward(self, forward: int) -> None:
            if place == "end_forward":
                raise KeyError(place)

        def see(self, *_: Any) -> None:
            if place == "see":
                raise KeyError(place)

    class BrokenEditor(Push):
        @staticmethod
        def compute(call: Any, editors: list[Any]) -> Any:
            raise KeyError(place)

    model = build("llama")
    before = state(model)
    participant = BrokenEditor() if place == "compute" else Broken()

    def body() -> None:
        with attach(model, participant):
            _run(model, "llama")
            if place == "body":
                raise KeyError(place)

    with pytest.raises(KeyError, match=place):
        body()
    assert unchanged(before, state(model))


def test_an_exception_on_the_way_in() -> None:
    from attnbias.hub.adapter import Session

    model = build("llama")
    before = state(model)
    hooked = Session._hook
    count = []

    def breaking(self: Session, module: nn.Module) -> None:
        hooked(self, module)
        count.append(module)
        if len(count) == 2:
            raise MemoryError

    Session._hook = breaking  # type: ignore[method-assign]
    try:
        with pytest.raises(MemoryError), attach(model, See()):
            pass
    finally:
        Session._hook = hooked  # type: ignore[method-assign]
    assert len(count) == 2
    assert unchanged(before, state(model))


def test_nested_contexts_share_a_session() -> None:
    model = build("llama")
    before = state(model)
    outer, inner, editor = See(), See(), Push()
    with attach(model, outer) as first:
        _run(model, "llama")
        with attach(model, inner) as second:
            assert first is second
            _run(model, "llama")
            with attach(model, editor):
                _run(model, "llama")
        _run(model, "llama")
    assert unchanged(before, state(model))
    assert outer.began == [0, 1, 2, 3]
    assert inner.began == [1, 2]
    assert len(editor.seen) == 2
    assert len(outer.calls) == 8


def test_nested_edits_add_up() -> None:
    model = build("llama")
    with attach(model, Push(0.5)), attach(model, Push(1.5)):
        both = _run(model, "llama")
    with attach(model, Push(2.0)):
        one = _run(model, "llama")
    assert same(both, one)


def test_contexts_may_end_out_of_order() -> None:
    model = build("llama")
    before = state(model)
    first, second = attach(model, See()), attach(model, See())
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert state(model)["modules"] != before["modules"]
    second.__exit__(None, None, None)
    assert unchanged(before, state(model))


def test_part_of_a_model_cannot_be_entered_again() -> None:
    model = build("clip")
    with attach(model, See()):
        _refused(model.text_model, "nest contexts on the same model")


def test_two_models_at_once() -> None:
    one, two = build("llama"), build("bert")
    plain = _run(one, "llama"), _run(two, "bert")
    states = state(one), state(two)
    with attach(one, first := See()), attach(two, second := See()):
        ours = _run(one, "llama"), _run(two, "bert")
    assert same(plain[0], ours[0])
    assert same(plain[1], ours[1])
    assert len(first.calls) == len(second.calls) == 2
    assert unchanged(states[0], state(one))
    assert unchanged(states[1], state(two))


def test_models_that_share_a_config() -> None:
    model = build("llama")
    twin: Any = type(model)(model.config).eval()
    assert twin.config is model.config
    plain = _run(twin, "llama")
    with attach(model, Push()) as session:
        assert same(plain, _run(twin, "llama"))  # not in the context: stock
        assert not session.calls
        with attach(twin, Push()):
            edited = _run(twin, "llama")
        assert not same(plain, edited)
        _run(model, "llama")
    assert same(plain, _run(twin, "llama"))


def test_a_copy_made_inside_is_refused_not_ignored() -> None:
    model = build("llama")
    with attach(model, See()):
        twin = copy.deepcopy(model)
        with pytest.raises(Refused, match="copy before entering"):
            _run(twin, "llama")


def _in_thread(action: Any) -> list[BaseException]:
    caught: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return caught


def test_a_second_thread_is_refused() -> None:
    model = build("llama")
    before = state(model)

    def entering() -> None:
        with attach(model, See()):
            _run(model, "llama")

    with attach(model, see := See()):
        for action in (entering, lambda: _run(model, "llama")):
            (error,) = _in_thread(action)
            assert isinstance(error, Refused)
            assert "another thread" in str(error)
        _run(model, "llama")  # the first thread is not disturbed
        assert see.ended == [0]
    assert unchanged(before, state(model))
    assert not _in_thread(entering)


def test_a_second_thread_during_a_forward() -> None:
    model: Any = build("llama")
    refused: list[BaseException] = []

    class Intruded(See):
        def see(self, call: Any, *rest: Any) -> None:
            super().see(call, *rest)
            for part in (model, model.model):  # the part is the one whose forward runs right now
                refused.extend(_in_thread(lambda part=part: _run(part, "llama")))

    with attach(model, see := Intruded()):
        _run(model, "llama")
    assert [type(one) for one in refused] == [Refused] * 4
    assert (see.began, see.ended) == ([0], [0])


@contextlib.contextmanager
def _other_library(wrap: Any) -> Iterator[None]:
    """What kvpress does at import: every entry of the registry is written over, locally."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    before = dict(registry._local_mapping)
    try:
        for name in list(registry.keys()):
            registry[name] = wrap(registry[name])
        yield
    finally:
        registry._local_mapping.clear()
        registry._local_mapping.update(before)


def _patched(function: Any) -> Any:
    def wrapper(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        wrapper.calls += 1  # type: ignore[attr-defined]
        return function(module, query, key, value, mask, **kwargs)

    wrapper.calls = 0  # type: ignore[attr-defined]
    return wrapper


def test_a_library_that_wrote_over_the_registry_before() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as registry

    model = build("llama")
    plain = _run(model, "llama")
    with _other_library(_patched):
        before = state(model)
        with attach(model, see := See()):
            ours = _run(model, "llama")
        assert same(plain, ours)
        assert len(see.calls) == 2
        assert registry["sdpa"].calls == 2  # its wrapper is part of what the model would compute
        with attach(model, Push()):
            assert not same(plain, _run(model, "llama"))
        assert unchanged(before, state(model))


@pytest.mark.parametrize("hostile", [False, True])
def test_a_library_that_writes_over_the_registry_inside(hostile: bool) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def replaced(function: Any) -> Any:
        return sdpa_attention_forward

    model = build("llama")
    plain = _run(model, "llama")
    before = state(model)
    with attach(model, editor := Push()):
        with _other_library(replaced if hostile else _patched):
            edited = _run(model, "llama")
        again = _run(model, "llama")
    assert len(editor.seen) == 4
    assert not same(plain, edited)
    assert same(edited, again)
    assert unchanged(before, state(model))
    # What it left under our name does not outlive the context, nor does it spoil the next one.
    with attach(model, Push()):
        assert same(edited, _run(model, "llama"))
    assert same(plain, _run(model, "llama"))


def test_gradient_checkpointing() -> None:
    def gradients(participants: list[Any], checkpointing: bool) -> dict[str, Any]:
        model: Any = build("llama")
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        tokens = inputs_of("llama")["input_ids"]
        with contextlib.ExitStack() as stack:
            for one in participants:
                stack.enter_context(attach(model, one))
            model(tokens, labels=tokens, use_cache=False).loss.backward()
        return {name: one.grad.clone() for name, one in model.named_parameters()}

    plain = gradients([], True)
    ours = gradients([see := See()], True)
    assert all(torch.equal(plain[name], ours[name]) for name in plain)
    assert len(see.calls) == 2  # not again in backward
    assert (see.began, see.ended) == ([0], [0])
    wanted = gradients([Push()], False)
    found = gradients([editor := Push()], True)
    assert [again for _, again in editor.seen] == [False, False, True, True]
    assert all(torch.allclose(wanted[name], found[name], atol=1e-6) for name in wanted)
    assert not all(torch.allclose(wanted[name], plain[name], atol=1e-4) for name in wanted)


def test_peft() -> None:
    from peft import LoraConfig, get_peft_model

    base = build("llama")
    wanted = sites(base)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    assert sites(model) == wanted
    plain = _run(model, "llama")
    before = state(model)
    with attach(model, see := See()), attach(base, Push(0.0)):
        assert same(plain, _run(model, "llama"))
        text = model.generate(**inputs_of("llama"), max_new_tokens=2, do_sample=False)
    assert text.shape == (2, 11)
    assert len(see.calls) == 6
    with attach(model, Push()):
        assert not same(plain, _run(model, "llama"))
    assert unchanged(before, state(model))


def test_plain_wrapper() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = build("bert"), build("bert")

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            left, right = self.left(input_ids=tokens)[0], self.right(input_ids=tokens)[0]
            return torch.cat([left, right], -1)

    model = Wrapped()
    names = [(site.tower, site.layer, site.name) for site in sites(model)]
    assert names[0] == ("text", 0, "left.encoder.layer.0.attention.self")
    assert names[2] == ("text 2", 0, "right.encoder.layer.0.attention.self")
    tokens = inputs_of("bert")["input_ids"]
    with torch.no_grad():
        plain = model(tokens)
        with attach(model, see := See()):
            ours = model(tokens)
    assert same(plain, ours)
    assert see.began == [0]  # one forward of the whole
    assert len(see.calls) == 4


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_compile(how: str) -> None:
    torch._dynamo.reset()
    model: Any = build("llama")
    tokens = inputs_of("llama")["input_ids"]
    compiled: Any = model
    if how == "wrapper":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    with torch.no_grad():
        plain = compiled(tokens, use_cache=False).logits
        before = state(model)
        for _ in range(2):  # on, off, on, off: graphs of the other state must not be used
            with attach(compiled, see := See()):
                ours = compiled(tokens, use_cache=False).logits
            assert torch.equal(plain, ours)
            assert len(see.calls) == 2
            assert (see.began, see.ended) == ([0], [0])
            with attach(compiled, editor := Push()):
                edited = compiled(tokens, use_cache=False).logits
            assert len(editor.seen) == 2
            assert not torch.allclose(plain, edited, atol=1e-4)
            assert torch.equal(plain, compiled(tokens, use_cache=False).logits)
    assert unchanged(before, state(model))
    torch._dynamo.reset()


def test_maps_asked_for() -> None:
    eager, fused = build("llama", "eager"), build("llama", "sdpa")
    wanted = _run(eager, "llama", output_attentions=True).attentions
    with attach(eager, See()):
        ours = _run(eager, "llama", output_attentions=True).attentions
    assert len(wanted) == len(ours) == 2
    assert all(torch.equal(one, two) for one, two in zip(wanted, ours, strict=True))
    with attach(eager, Push()), pytest.raises(Refused, match="unedited map"):
        _run(eager, "llama", output_attentions=True)
    with attach(fused, Push()):  # as stock: sdpa has no maps to give
        assert not _run(fused, "llama", output_attentions=True).attentions


def test_a_layer_called_alone_is_refused() -> None:
    model: Any = build("llama")
    with attach(model, See()), torch.no_grad():
        model.model(inputs_of("llama")["input_ids"])  # a part that is a model of its own: fine
        hidden, place = torch.randn(1, 3, 32), torch.zeros(1, 3, 8)
        with pytest.raises(Refused, match="outside a forward"):
            model.model.layers[0](hidden, position_embeddings=(place + 1, place))


def test_required_sites_that_were_not_reached_are_named() -> None:
    model: Any = build("bart")
    see: Any = See()
    see.required = sites(model)
    wanted = pytest.raises(Refused, match="decoder layer 0, cross layer 0, decoder layer 1")
    with wanted, attach(model, see), torch.no_grad():
        model.get_encoder()(inputs_of("bart")["input_ids"])
    with attach(model, see):
        _run(model, "bart")


def test_training_mode_with_dropout_is_stock() -> None:
    for attention in ("sdpa", "eager"):
        model = build("gpt2", attention).train()
        tokens = inputs_of("gpt2")["input_ids"]
        torch.manual_seed(5)
        plain = model(tokens)
        torch.manual_seed(5)
        with attach(model, Push(0.0)):
            ours = model(tokens)
        assert torch.equal(plain.logits, ours.logits)
        assert len(outputs(ours)) == len(outputs(plain))


def test_dropout_without_gradients_is_stock() -> None:
    class Bystander(See):
        def see(self, *_: Any) -> None:
            self.calls.append({})

    model: Any = build("gpt2").train()
    model.config.attn_pdrop = 0.3
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.3
    with torch.no_grad():
        torch.manual_seed(5)
        plain = _run(model, "gpt2")
        torch.manual_seed(5)
        with attach(model, see := Bystander()):
            ours = _run(model, "gpt2")
        assert len(see.calls) == 2
        assert same(plain, ours)
        assert not same(plain, _run(model.eval(), "gpt2"))
