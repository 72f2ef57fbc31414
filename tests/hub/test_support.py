"""Models that work, models that only seem to, and the sentences they get."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from attnbias import AttnbiasError, Refused
from attnbias.hub import Site, attach, sites, support
from tests.hub.models import BUILD, FAMILIES, SIZES, Push, See, build, inputs_of, state, unchanged

OWN_ATTENTION: dict[str, Any] = {
    "Bloom": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=60)
    ),
    "DeBERTa-v2": lambda: hf.DebertaV2Model(hf.DebertaV2Config(**SIZES)),
    "MPT": lambda: hf.MptForCausalLM(
        hf.MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=60)
    ),
    "Falcon": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    ),
    "GPT-J": lambda: hf.GPTJForCausalLM(
        hf.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=60)
    ),
}


def _refused(model: nn.Module, sentence: str) -> None:
    with pytest.raises(Refused, match=sentence), attach(model, See()):
        raise AssertionError("entered")


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    model = build(name)
    model.train()
    support(model)  # a first forward may settle things of the model's own (Swin's shifts)
    before = state(model)
    torch.manual_seed(0)
    number = torch.rand(1)
    torch.manual_seed(0)
    report = support(model)
    assert torch.equal(torch.rand(1), number)
    assert unchanged(before, state(model))
    assert report.supported
    assert [layer.site for layer in report.layers] == sites(model)
    assert all(layer.calls >= 1 and layer.supported for layer in report.layers), str(report)
    text = str(report)
    assert f"{len(report.layers)} of {len(report.layers)} attention layers" in text
    assert text.count("observe, steer") == len(report.layers)


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_a_model_with_attention_of_its_own(name: str) -> None:
    model = OWN_ATTENTION[name]().eval()
    before = state(model)
    report = support(model)
    assert not report.supported
    assert "does not call the attention interface" in str(report)
    _refused(model, f"^{type(model).__name__} does not call")
    assert unchanged(before, state(model))


def test_a_model_that_looks_right_and_never_calls() -> None:
    model: Any = build("llama")
    kind = type(model.model.layers[0].self_attn)

    class Shortcut(kind):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Any, **_: Any) -> Any:
            return hidden_states, None

    for layer in model.model.layers:
        layer.self_attn.__class__ = Shortcut
    assert len(sites(model)) == 2
    assert "does not call the attention interface" in str(support(model))
    with pytest.raises(Refused, match="does not call"), attach(model, See()), torch.no_grad():
        model(**inputs_of("llama"))


def test_a_layer_that_computes_more_is_found_out() -> None:
    model: Any = build("llama", "eager")
    module = __import__("transformers.models.llama.modeling_llama", fromlist=["x"])
    stock = module.eager_attention_forward

    def twisted(*arguments: Any, **options: Any) -> Any:
        output, weights = stock(*arguments, **options)
        return output * 1.1, weights

    module.eager_attention_forward = twisted

    class Bystander(See):
        def see(self, call: Any, *_: Any) -> None:
            call.plain()

    try:
        report = support(model)
        with torch.no_grad():
            for participant in (See(), Push()):
                with pytest.raises(Refused, match="computes more"), attach(model, participant):
                    model(**inputs_of("llama"))
            with attach(model, Bystander()):  # who needs no scores is not bothered
                model(**inputs_of("llama"))
    finally:
        module.eager_attention_forward = stock
    assert not report.supported
    assert "computes more" in str(report)
    assert support(model).supported


def test_softcap_is_refused_where_scores_are_needed() -> None:
    torch.manual_seed(0)
    config = hf.Gemma2Config(**{**SIZES, "num_key_value_heads": 2}, head_dim=8, sliding_window=4)
    model: Any = hf.Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    report = support(model)
    assert not report.supported
    assert "softcap" in str(report)
    tokens = {"input_ids": inputs_of("llama")["input_ids"]}

    class Bystander(See):
        def see(self, call: Any, *_: Any) -> None:
            assert call.plain().shape[1] == 9

    with torch.no_grad():
        plain = model(**tokens).logits
        with attach(model, Bystander()):
            assert torch.equal(plain, model(**tokens).logits)
        with pytest.raises(Refused, match="caps its scores"), attach(model, See()):
            model(**tokens)


def test_the_upcast_option_of_gpt2() -> None:
    torch.manual_seed(0)
    kind, config = BUILD["gpt2"]()
    config.reorder_and_upcast_attn = True
    model: Any = kind._from_config(config, attn_implementation="eager").eval()
    assert support(model).supported
    with torch.no_grad():
        plain = model(**inputs_of("gpt2")).logits
        with attach(model, See()):
            assert torch.equal(plain, model(**inputs_of("gpt2")).logits)


@pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "somebody_elses"])
def test_other_implementations_are_refused(name: str) -> None:
    model: Any = build("llama")
    model.config._attn_implementation_internal = name
    before = state(model)
    _refused(model, r"set_attn_implementation\('sdpa'\)")
    assert unchanged(before, state(model))


def test_a_class_that_goes_by_the_name() -> None:
    model: Any = build("llama")
    kind = type(model.model.layers[0].self_attn)

    class Choosy(kind):  # type: ignore[misc, valid-type]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            if self.config._attn_implementation == "sdpa":
                options["scaling"] = 1.0
            return super().forward(*arguments, **options)

    model.model.layers[0].self_attn.__class__ = Choosy
    _refused(model, "Choosy computes differently by the name")


def test_not_a_model() -> None:
    for wrong in (None, "bert-base-uncased", 3):
        with pytest.raises(AttnbiasError, match=r"model must be a torch\.nn\.Module, got"):
            sites(wrong)  # type: ignore[arg-type]
    assert sites(nn.Linear(2, 2)) == []
    with pytest.raises(Refused, match="Linear does not call"), attach(nn.Linear(2, 2), See()):
        pass


def test_towers_and_numbers() -> None:
    assert [str(site) for site in sites(build("bart"))] == [
        "encoder layer 0",
        "encoder layer 1",
        "decoder layer 0",
        "cross layer 0",
        "decoder layer 1",
        "cross layer 1",
    ]
    clip = sites(build("clip"))
    assert [(site.tower, site.layer) for site in clip] == [
        ("text", 0),
        ("text", 1),
        ("vision", 0),
        ("vision", 1),
    ]
    model = build("vit")
    second = sites(model)[1]
    assert second == Site("vision", 1, second.name, "self")
    assert "Attention" in type(model.get_submodule(second.name)).__name__
    assert sites(build("bart"))[-1].kind == "cross"
    assert {site.tower for site in sites(build("whisper"))} == {"encoder", "decoder", "cross"}


def test_masks_of_the_wrong_shape() -> None:
    model = build("llama")
    tokens = inputs_of("llama")["input_ids"]
    for shape in ((2, 3, 9, 9), (2, 1, 9)):
        with (
            torch.no_grad(),
            attach(model, See()),
            pytest.raises((Refused, ValueError, RuntimeError)),
        ):
            model(tokens, attention_mask=torch.ones(shape, dtype=torch.bool))


def test_inputs_that_do_not_fit() -> None:
    model: Any = build("llama")
    model.resize_token_embeddings(2)
    model.config.vocab_size = 100
    with pytest.raises(AttnbiasError, match="give inputs="):
        support(model)


def test_real_models(stories: Any, minilm: Any) -> None:
    for path, kind in ((stories, hf.AutoModelForCausalLM), (minilm, hf.AutoModel)):
        report = support(kind.from_pretrained(path))
        assert report.supported
        assert all(layer.supported for layer in report.layers)
