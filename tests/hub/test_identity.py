"""A participant that changes nothing changes nothing: differences from stock are exactly 0.0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from attnbias.hub import attach
from tests.hub.models import (
    DECODERS,
    EAGER_ONLY,
    FAMILIES,
    GROUPED,
    IMAGE,
    OLD,
    SIZES,
    TOKENS,
    See,
    build,
    inputs_of,
    masks,
    same,
)

BOTH = [
    (name, attention)
    for name in FAMILIES
    for attention in ("sdpa", "eager")
    if attention == "eager" or name not in EAGER_ONLY
]


def test_every_family_is_there() -> None:
    assert OLD or len(FAMILIES) == 20


def _with_mask(name: str, kind: str) -> dict[str, Any]:
    inputs: dict[str, Any] = inputs_of(name)
    mask = masks()[kind]
    if mask is not None and "input_ids" in inputs:
        inputs["attention_mask"] = mask
    return inputs


@pytest.mark.parametrize(("name", "attention"), BOTH)
def test_forward(name: str, attention: str) -> None:
    model = build(name, attention)
    kinds = ["none", "ones", "left", "right", "scattered"]
    if "input_ids" not in inputs_of(name):
        kinds = ["none"]
    for kind in kinds:
        inputs = _with_mask(name, kind)
        with torch.no_grad():
            plain = model(**inputs)
            see = See()
            with attach(model, see) as session:
                ours = model(**inputs)
        assert same(plain, ours), kind
        assert all(session.calls[site] for site in session.sites)
        assert see.began == see.ended == [0]


@pytest.mark.parametrize("name", FAMILIES)
def test_sharp_enough_to_notice(name: str) -> None:
    # The checks of `See` mean little on heads that attend uniformly.
    model, see = build(name), See()
    with torch.no_grad(), attach(model, see):
        model(**inputs_of(name))
    sharp = torch.cat([one.flatten() for one in see.entropies])
    assert float((sharp < 0.5).double().mean()) > 0.25


@pytest.mark.parametrize("name", ["llama", "bert", "vit", "gpt2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    for kind in ("none", "left"):
        inputs = _with_mask(name, kind) if name != "vit" else inputs_of(name)
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        with torch.no_grad():
            plain = model(**inputs)
            with attach(model, See(tolerance=1e-9 if dtype == torch.float64 else 5e-2)):
                ours = model(**inputs)
        assert same(plain, ours)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"do_sample": False, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 3},
}
if OLD:
    del WAYS["chunked prefill"]  # raises in stock generate: "without a cache"


def _generated(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(
        max_new_tokens=4, return_dict_in_generate=True, output_logits=True, **options
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in (*DECODERS, "bart", "t5") if name in FAMILIES])
def test_generate(name: str, way: str) -> None:
    if way == "chunked prefill" and name in ("bart", "t5"):
        return  # transformers prefills in chunks only where there is no encoder
    model: Any = build(name)
    inputs: dict[str, Any] = {"input_ids": inputs_of(name)["input_ids"]}
    inputs["attention_mask"] = masks()["left"]
    with torch.no_grad():
        plain = _generated(model, **inputs, **WAYS[way])
        see = See()
        with attach(model, see):
            ours = _generated(model, **inputs, **WAYS[way])
    assert torch.equal(plain.sequences, ours.sequences)
    for one, two in zip(plain.logits, ours.logits, strict=True):
        assert torch.equal(one, two)
    decoding = [one for one in see.calls if one["phase"] == "decode"]
    assert bool(decoding) == (way != "no cache")


def test_offloaded_and_sliding_caches() -> None:
    from transformers import DynamicCache

    model: Any = build("gemma3")
    tokens = inputs_of("gemma3")["input_ids"]

    def run(cache: Any) -> list[torch.Tensor]:
        found = [model(tokens[:, :5], past_key_values=cache, use_cache=True).logits]
        found += [model(tokens[:, k : k + 1], past_key_values=cache).logits for k in range(5, 9)]
        return found

    with torch.no_grad():
        for make in (lambda: DynamicCache(config=model.config), lambda: DynamicCache()):
            plain = run(make())
            see = See()
            with attach(model, see):
                ours = run(make())
            assert all(torch.equal(one, two) for one, two in zip(plain, ours, strict=True))
    # The sliding cache is cropped: only the mask request knows which positions its keys have.
    with torch.no_grad(), attach(model, see := See()):
        run(DynamicCache(config=model.config))
    last = see.of(0)[-1]
    assert last["sizes"] == (1, 4)
    assert last["keys"] == [[5, 6, 7, 8]]
    assert last["queries"] == [[8]]


def test_packed_sequences() -> None:
    for name in ("llama", "mistral", "qwen3"):
        model = build(name)
        tokens = inputs_of(name)["input_ids"]
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 0, 1, 0]])
        options = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        with torch.no_grad():
            plain = model(**options)
            with attach(model, see := See()):
                ours = model(**options)
            lost = model(input_ids=tokens, use_cache=False)
        assert same(plain, ours)
        assert not torch.allclose(plain.logits, lost.logits, atol=1e-3)
        kinds = {type(term).__name__ for term in see.calls[0]["bias"].terms()}
        assert "Segments" in kinds
        assert "MaskFunction" not in kinds


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_four_dimensional_masks(attention: str) -> None:
    model = build("llama", attention)
    tokens = inputs_of("llama")["input_ids"]
    keep = torch.ones(9, 9, dtype=torch.bool).tril()
    keep[6, 2] = keep[8, 5] = False
    whole = keep[None, None].expand(2, 1, 9, 9)
    hidden = torch.zeros(2, 1, 9, 9).masked_fill(~whole, torch.finfo(torch.float32).min)
    soft = hidden + torch.randn(2, 1, 9, 9).clamp(-2, 2)
    given = [hidden, soft] if attention == "eager" else [whole, hidden, soft]
    for mask in given:
        with torch.no_grad():
            plain = model(input_ids=tokens, attention_mask=mask)
            with attach(model, see := See()):
                ours = model(input_ids=tokens, attention_mask=mask)
        assert same(plain, ours)
        bias = see.calls[0]["bias"]
        assert torch.equal(bias.dense().expand(2, 1, 9, 9) > -torch.inf, whole)


def test_prompt_look_up() -> None:
    model: Any = build("llama")
    tokens = torch.tensor([[3, 4, 5, 6, 7, 8] * 4])  # whatever comes next, it has been there
    tokens = torch.cat([torch.arange(10, 60)[None], tokens], -1)
    options = {
        "eos_token_id": 59,
        "max_new_tokens": 12,
        "do_sample": False,
        "prompt_lookup_num_tokens": 3,
    }
    with torch.no_grad():
        plain = model.generate(tokens, **options)
        with attach(model, see := See()):
            ours = model.generate(tokens, **options)
    assert torch.equal(plain, ours)
    assert any(1 < one["sizes"][0] < one["sizes"][1] for one in see.calls)  # candidates checked


def test_autocast() -> None:
    model = build("llama")
    for keep in (None, masks()["left"]):
        inputs = {**inputs_of("llama"), "attention_mask": keep}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            plain = model(**inputs)
            with attach(model, See(tolerance=5e-2)):
                ours = model(**inputs)
        assert same(plain, ours)


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_text_and_image(family: str) -> None:
    torch.manual_seed(0)
    text = {**GROUPED, **TOKENS}
    vision = {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **IMAGE}
    tokens = torch.randint(10, 60, (2, 22))
    tokens[:, 2:18] = 5
    inputs: dict[str, Any] = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    inputs["pixel_values"] = torch.randn(2, 3, 16, 16)
    if family == "llava":
        config: Any = hf.LlavaConfig(
            text_config=hf.LlamaConfig(**text),
            vision_config=hf.CLIPVisionConfig(**vision),
            image_token_index=5,
            vision_feature_select_strategy="default",
        )
        model: Any = hf.LlavaForConditionalGeneration(config).eval()
    else:
        kinds = ["sliding_attention", "full_attention"]
        config = hf.Gemma3Config(
            text_config={**text, "head_dim": 8, "sliding_window": 8, "layer_types": kinds},
            vision_config=vision,
            mm_tokens_per_image=16,
            image_token_index=5,
            boi_token_index=3,
            eoi_token_index=4,
        )
        model = hf.Gemma3ForConditionalGeneration(config).eval()
        inputs["token_type_ids"] = (tokens == 5).long()
    with torch.no_grad():
        plain, text_out = model(**inputs), _generated(model, **inputs, do_sample=False)
        with attach(model, see := See()):
            ours, again = model(**inputs), _generated(model, **inputs, do_sample=False)
    assert same(plain.logits, ours.logits)
    assert torch.equal(text_out.sequences, again.sequences)
    assert {one["site"].tower for one in see.calls} == {"text", "vision"}
    if family == "gemma3":  # image tokens see each other: a rule that lives in the mask function
        kinds = [type(term).__name__ for term in see.of(1)[0]["bias"].terms()]
        assert "MaskFunction" in kinds


def test_real_decoder(stories: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for attention in ("sdpa", "eager"):
        model = AutoModelForCausalLM.from_pretrained(stories, attn_implementation=attention).eval()
        tokenizer = AutoTokenizer.from_pretrained(stories)
        tokens = tokenizer("Once upon a time there was a little dog", return_tensors="pt")
        with torch.no_grad():
            plain, text = model(**tokens), _generated(model, **tokens, do_sample=False)
            with attach(model, See(1e-4)):
                ours, again = model(**tokens), _generated(model, **tokens, do_sample=False)
        assert same(plain.logits, ours.logits)
        assert torch.equal(text.sequences, again.sequences)


def test_real_encoder(minilm: Any) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm).eval()
    tokens = torch.randint(1000, 20000, (2, 12))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    with torch.no_grad():
        plain = model(input_ids=tokens, attention_mask=mask)
        with attach(model, See(1e-4)):
            ours = model(input_ids=tokens, attention_mask=mask)
    assert same(plain, ours)
