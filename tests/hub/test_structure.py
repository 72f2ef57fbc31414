"""The structured bias of a call against the mask of stock eager attention, entry by entry."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    StaticCache,
    masking_utils,
)

from attnbias import Refused
from attnbias.hub import Call, MaskRequest, attach, sites
from attnbias.hub.registry import mask_function
from tests.hub.models import FAMILIES, GROUPED, OLD, SIZES, See, build, inputs_of, masks, same

LENGTH = 9


def _keeps() -> list[Tensor | None]:
    return list(masks(2, LENGTH).values())


def _stock(request: MaskRequest) -> Tensor:
    """The stock 4-D eager mask as booleans, made by transformers from the same arguments."""
    arguments = {**request.arguments, "allow_is_bidirectional_skip": False}
    made = masking_utils.eager_mask(**arguments)
    assert made is not None
    return made == 0


def _visible(request: MaskRequest) -> Tensor:
    bias = request.bias()
    shape = tuple(request.shape)
    if bias is None:
        return torch.ones(shape, dtype=torch.bool)
    return (bias.dense() == 0).expand(shape)


def _request(**arguments: Any) -> MaskRequest:
    base: dict[str, Any] = {
        "batch_size": 2,
        "q_length": LENGTH,
        "kv_length": LENGTH,
        "q_offset": 0,
        "kv_offset": 0,
        "mask_function": masking_utils.causal_mask_function,
        "attention_mask": None,
        "device": torch.device("cpu"),
        "dtype": torch.float32,
    }
    base.update(arguments)
    if base["attention_mask"] is not None:
        base["attention_mask"] = base["attention_mask"].bool()
    if OLD:
        start = base.pop("q_offset")
        base["cache_position"] = torch.arange(base.pop("q_length")) + start
    return mask_function(**base)


def _left(keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.zeros(2, dtype=torch.long)
    return (keep.cumsum(-1) == 0).sum(-1)


RULES: dict[str, Any] = {
    "causal": lambda keep: masking_utils.causal_mask_function,
    "bidirectional": lambda keep: masking_utils.bidirectional_mask_function,
    "sliding": lambda keep: masking_utils.sliding_window_causal_mask_function(4),
    "wide window": lambda keep: masking_utils.sliding_window_causal_mask_function(50),
    "sliding both": lambda keep: masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunked": lambda keep: masking_utils.chunked_causal_mask_function(4, _left(keep)),
    "own rule": lambda keep: lambda b, h, q, k: (q + k) % 3 != 1,
    "prefix": lambda keep: masking_utils.or_masks(
        masking_utils.causal_mask_function, lambda b, h, q, k: k < 3
    ),
    "and own": lambda keep: masking_utils.and_masks(
        masking_utils.causal_mask_function, lambda b, h, q, k: k != 2 + b
    ),
    "blocks": lambda keep: masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(
            torch.tensor([[-1, 0, 0, 0, -1, 1, 1, -1, -1, -1, -1, -1]]).expand(2, -1)
        ),
    ),
}
NEEDED = {
    "sliding both": "sliding_window_bidirectional_mask_function",
    "blocks": "blockwise_overlay",
}
RULES = {
    name: rule
    for name, rule in RULES.items()
    if hasattr(masking_utils, NEEDED.get(name, "and_masks"))
}
SHAPES = {
    "prefill": {},
    "chunk": {"q_length": 3, "q_offset": 6},
    "decode": {"q_length": 1, "q_offset": 8},
    "static": {"q_length": 4, "q_offset": torch.tensor(3), "kv_length": 12},
    "cropped": {"q_length": 2, "q_offset": 7, "kv_length": 5, "kv_offset": 4},
}
STRUCTURED = ("causal", "bidirectional", "sliding", "wide window", "sliding both", "chunked")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule(rule: str, shape: str) -> None:
    for keep in _keeps():
        request = _request(mask_function=RULES[rule](keep), attention_mask=keep, **SHAPES[shape])
        assert torch.equal(_visible(request), _stock(request)), keep
        bias = request.bias()
        kinds = {type(term).__name__ for term in (bias.terms() if bias is not None else [])}
        assert ("MaskFunction" in kinds) == (rule not in STRUCTURED)


@pytest.mark.parametrize("rule", ["causal", "sliding", "chunked", "prefix"])
def test_packed(rule: str) -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 1, 0]])
    ids = masking_utils.find_packed_sequence_indices(positions)
    assert ids is not None
    if OLD:
        same_sequence = masking_utils.packed_sequence_mask_function(ids)
        packed = masking_utils.and_masks(RULES[rule](None), same_sequence)
    else:
        make = masking_utils.packed_sequence_compatibility_function
        packed = make(RULES[rule](None), positions, ids)
    request = _request(mask_function=packed)
    assert torch.equal(_visible(request), _stock(request))


def test_older_calling_form() -> None:
    new = _request(q_length=3, q_offset=6)
    old = MaskRequest(
        lambda name: masking_utils.eager_mask,
        {
            "batch_size": 2,
            "cache_position": torch.arange(6, 9),
            "kv_length": LENGTH,
            "kv_offset": 0,
            "mask_function": masking_utils.causal_mask_function,
            "attention_mask": None,
        },
    )
    assert old.shape == new.shape == (2, 1, 3, LENGTH)
    assert torch.equal(_visible(old), _visible(new))
    assert torch.equal(old.query_positions(), new.query_positions())


def test_running_length_is_read_at_once() -> None:
    # A static cache hands over its own counter and advances it in place before attention runs.
    counter = torch.tensor([3, 4] if OLD else 3)
    if OLD:
        request = _request(kv_length=12)
        request = mask_function(**{**request.arguments, "cache_position": counter})
    else:
        request = _request(q_length=2, q_offset=counter, kv_length=12)
    counter += 2
    assert request.query_start == 3
    assert torch.equal(_visible(request), _stock(request))


def test_behaves_like_a_mask() -> None:
    request = _request(attention_mask=masks()["left"], allow_is_causal_skip=True)
    assert request.ndim == request.dim() == 4
    assert request.shape == (2, 1, LENGTH, LENGTH)
    assert request.to("cpu") is request
    assert request.to(dtype=torch.float16) is request
    assert request.contiguous() is request
    assert mask_function(**{**request.arguments, "attention_mask": request}) is request
    # A model that computes with its mask gets what it would have had.
    whole = masking_utils.sdpa_mask(**request.arguments)
    assert torch.equal(request[:, :, 2:], whole[:, :, 2:])
    assert torch.equal(torch.where(request, 1.0, 0.0), whole.float())
    assert torch.equal(~request, ~whole)


def test_stock_mask_is_stock_and_made_once() -> None:
    for keep in _keeps():
        request = _request(attention_mask=keep, allow_is_causal_skip=True)
        for name, function in (
            ("sdpa", masking_utils.sdpa_mask),
            ("eager", masking_utils.eager_mask),
        ):
            made, wanted = request.stock(name), function(**request.arguments)
            assert (made is None) == (wanted is None) == request.skipped(name)
            assert made is request.stock(name)
            if wanted is not None:
                assert torch.equal(made, wanted)


def test_skip_is_found_without_the_mask() -> None:
    calls = []

    def counting(batch: Any, head: Any, query: Any, key: Any) -> Any:
        calls.append(1)
        return key <= query

    request = _request(mask_function=counting, allow_is_causal_skip=True)
    assert request.skipped("sdpa")
    assert not request.skipped("eager")
    assert not calls


def test_positions() -> None:
    left, right, holes = (masks()[name] for name in ("left", "right", "scattered"))
    assert _request().query_positions().tolist() == [list(range(9))]
    found = _request(attention_mask=left).query_positions()
    assert found[1].tolist() == [-1, -1, -1, 0, 1, 2, 3, 4, 5]
    assert _request(attention_mask=right).key_positions()[1].tolist() == [
        0,
        1,
        2,
        3,
        4,
        5,
        -1,
        -1,
        -1,
    ]
    found = _request(attention_mask=holes).key_positions()
    assert found[1].tolist() == [-1, 0, 1, -1, -1, 2, 3, -1, 4]
    cropped = _request(attention_mask=left, q_length=1, q_offset=8, kv_length=4, kv_offset=5)
    assert cropped.query_positions().tolist() == [[8], [5]]
    assert cropped.key_positions().tolist() == [[5, 6, 7, 8], [2, 3, 4, 5]]
    static = _request(q_length=2, q_offset=torch.tensor(3), kv_length=7)
    assert static.key_positions().tolist() == [[0, 1, 2, 3, 4, -1, -1]]
    assert static.query_positions().tolist() == [[3, 4]]


def test_a_rule_of_the_wrong_kind_is_refused() -> None:
    request = _request(mask_function=lambda b, h, q, k: (q - k).float())
    with pytest.raises(Refused, match="must return booleans"):
        _visible(request)


def _through(maker: Any, config: Any, **arguments: Any) -> tuple[Any, Any]:
    """What a model's own mask maker gives under our name, and under eager."""
    from attnbias.hub import registry

    embeds = torch.zeros(2, LENGTH, 4)
    names = inspect.signature(maker).parameters
    arguments["inputs_embeds" if "inputs_embeds" in names else "input_embeds"] = embeds
    if "cache_position" in names:
        arguments["cache_position"] = torch.arange(LENGTH)
    config._attn_implementation = "eager"
    stock = maker(config=config, **arguments)
    registry.register()
    registry.switch(config)
    try:
        return maker(config=config, **arguments), stock
    finally:
        registry.switch_back(config)
        registry.unregister()


@pytest.mark.parametrize("kind", ["none", "ones", "left", "right", "scattered"])
def test_through_the_makers_of_transformers(kind: str) -> None:
    keep = masks()[kind]
    makers = [
        (masking_utils.create_causal_mask, LlamaConfig(**GROUPED), {"past_key_values": None}),
        (
            masking_utils.create_sliding_window_causal_mask,
            MistralConfig(sliding_window=4, **GROUPED),
            {"past_key_values": None},
        ),
        (
            masking_utils.create_chunked_causal_mask,
            Llama4TextConfig(attention_chunk_size=4, **GROUPED),
            {"past_key_values": None},
        ),
        (masking_utils.create_bidirectional_mask, BertConfig(**SIZES), {}),
        (
            masking_utils.create_causal_mask,
            LlamaConfig(**GROUPED),
            {"past_key_values": None, "and_mask_function": lambda b, h, q, k: k != 3},
        ),
    ]
    for maker, config, options in makers:
        request, stock = _through(maker, config, attention_mask=keep, **options)
        assert isinstance(request, MaskRequest)
        wanted = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool) if stock is None else stock == 0
        assert torch.equal(_visible(request), wanted)


def test_static_cache_prefill_needs_no_mask() -> None:
    model: Any = build("llama")
    tokens = inputs_of("llama")["input_ids"]
    with torch.no_grad():
        plain = model(tokens, past_key_values=StaticCache(config=model.config, max_cache_len=20))
        with attach(model, see := See()):
            cache = StaticCache(config=model.config, max_cache_len=20)
            ours = model(tokens, past_key_values=cache)
            model(tokens[:, :1], past_key_values=cache)
    assert torch.equal(plain.logits, ours.logits)
    prefill, decode = see.of(0)
    assert prefill["sizes"] == (9, 20)
    assert prefill["keys"] == [[*range(9), *[-1] * 11]]
    assert decode["keys"] == [[*range(10), *[-1] * 10]]
    assert (decode["past"], decode["phase"]) == (9, "decode")


def test_cross_attention_knows_where_the_decoder_is() -> None:
    model: Any = build("bart")
    inputs = inputs_of("bart")
    keep = masks()["right"]
    with torch.no_grad(), attach(model, see := See()):
        model.generate(inputs["input_ids"], attention_mask=keep, max_new_tokens=3, do_sample=False)
    cross = see.of(0, "cross")
    assert [one["phase"] for one in cross] == ["prefill", "decode", "decode"]
    assert [one["queries"] for one in cross] == [[[k], [k]] for k in range(3)]
    assert cross[-1]["keys"][1] == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    assert see.of(0, "decoder")[-1]["queries"] == [[2], [2]]


def test_sinks_and_position_biases_are_described() -> None:
    with torch.no_grad():
        model = build("gpt_oss")
        with attach(model, see := See()):
            model(**inputs_of("gpt_oss"))
        sink = see.calls[0]["sink"]
        assert torch.equal(sink, model.model.layers[0].self_attn.sinks)
        if "t5" not in FAMILIES:
            return
        model = build("t5")
        with attach(model, see := See()):
            model(**inputs_of("t5"))
        names = {type(term).__name__ for term in see.of(0, "decoder")[0]["bias"].terms()}
    assert names == {"Window", "Dense"}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_log_sum_exp_is_free_where_it_can_be(attention: str) -> None:
    for name in ("llama", "bert", "vit", "mistral", "bart"):
        model = build(name, attention)
        for keep in (None, masks()["left"]):
            inputs: dict[str, Any] = inputs_of(name)
            if name != "vit":
                inputs["attention_mask"] = keep
            with torch.no_grad(), attach(model, see := See()):
                model(**inputs)
            assert {one["lse"] for one in see.calls} == {attention == "sdpa"}
    # With gradients the stock route is kept.
    with attach(model, see := See()):
        model(**inputs_of("bart"))
    assert not any(one["lse"] for one in see.calls)


def test_no_mask_means_what_the_implementation_makes_of_it() -> None:
    # Eager sees everything; sdpa follows is_causal, the argument before the module's attribute.
    model: Any = build("llama")
    module = model.model.layers[0].self_attn
    assert module.is_causal
    tensors = (torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))

    def bias(original: str, **arguments: Any) -> Any:
        session: Any = None
        site = sites(model)[0]
        return Call(session, site, module, tensors, None, arguments, original, print, 0, False).bias

    assert bias("eager") is None
    assert bias("eager", is_causal=True) is None
    assert bias("sdpa", is_causal=False) is None
    assert torch.equal(bias("sdpa").dense()[0, 0] == 0, torch.ones(3, 3).tril() == 1)


def test_padding_costs_no_square_mask_where_it_is_observed() -> None:
    made = []

    def counting(**arguments: Any) -> Any:
        whole = masking_utils.sdpa_mask(**arguments)
        made.append(whole)
        return whole

    for name in ("llama", "bert"):
        model = build(name)
        registry = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
        with torch.no_grad(), _swapped(registry, "sdpa", counting):
            plain = model(**inputs_of(name), attention_mask=masks()["left"])
            assert [type(one) for one in made] == [Tensor]
            made.clear()
            with attach(model, See()):
                ours = model(**inputs_of(name), attention_mask=masks()["left"])
        assert same(plain, ours)
        assert not made


@contextlib.contextmanager
def _swapped(registry: Any, name: str, function: Any) -> Iterator[None]:
    registry._local_mapping[name] = function
    try:
        yield
    finally:
        del registry._local_mapping[name]
