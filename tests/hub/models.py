"""Tiny models of every family, sharpened: random ones attend almost uniformly and prove little."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
IMAGE = {"image_size": 16, "patch_size": 4}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": 2,
}


def _vision() -> dict[str, Any]:
    return {**{k: v for k, v in SIZES.items() if k != "vocab_size"}, **IMAGE}


BUILD: dict[str, Any] = {
    "llama": lambda: (hf.LlamaForCausalLM, hf.LlamaConfig(**GROUPED, **TOKENS)),
    "qwen3": lambda: (hf.Qwen3ForCausalLM, hf.Qwen3Config(head_dim=8, **GROUPED, **TOKENS)),
    "mistral": lambda: (
        hf.MistralForCausalLM,
        hf.MistralConfig(sliding_window=4, **GROUPED, **TOKENS),
    ),
    "gemma3": lambda: (
        hf.Gemma3ForCausalLM,
        hf.Gemma3TextConfig(
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            **GROUPED,
            **TOKENS,
        ),
    ),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=60, n_positions=64, **TOKENS),
    ),
    "gpt_oss": lambda: (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=1,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            **GROUPED,
            **TOKENS,
        ),
    ),
    "neox": lambda: (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(max_position_embeddings=64, **SIZES, **TOKENS),
    ),
    "opt": lambda: (
        hf.OPTForCausalLM,
        hf.OPTConfig(
            ffn_dim=64,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.0,
            **{k: v for k, v in SIZES.items() if k != "intermediate_size"},
            **TOKENS,
        ),
    ),
    "phi3": lambda: (hf.Phi3ForCausalLM, hf.Phi3Config(**GROUPED, **TOKENS)),
    "llama4": lambda: (
        hf.Llama4ForCausalLM,
        hf.Llama4TextConfig(
            head_dim=8,
            attention_chunk_size=4,
            use_qk_norm=False,
            num_local_experts=2,
            intermediate_size_mlp=64,
            **GROUPED,
            **TOKENS,
        ),
    ),
    "deepseek_v3": lambda: (
        hf.DeepseekV3ForCausalLM,
        hf.DeepseekV3Config(
            num_key_value_heads=4,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=2,
            num_experts_per_tok=1,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            **SIZES,
            **TOKENS,
        ),
    ),
    "bert": lambda: (hf.BertModel, hf.BertConfig(**SIZES)),
    "modernbert": lambda: (
        hf.ModernBertModel,
        hf.ModernBertConfig(
            local_attention=4,
            global_attn_every_n_layers=2,
            cls_token_id=1,
            sep_token_id=2,
            **SIZES,
            **{**TOKENS, "eos_token_id": 2},
        ),
    ),
    "vit": lambda: (hf.ViTModel, hf.ViTConfig(**_vision())),
    "dinov2": lambda: (hf.Dinov2Model, hf.Dinov2Config(**_vision())),
    "swin": lambda: (
        hf.SwinModel,
        hf.SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=16,
            depths=[1, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
    ),
    "clip": lambda: (
        hf.CLIPModel,
        hf.CLIPConfig(
            text_config={**SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
            vision_config=_vision(),
        ),
    ),
    "bart": lambda: (hf.BartForConditionalGeneration, hf.BartConfig(**SEQ2SEQ)),
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration,
        hf.WhisperConfig(
            **{k: v for k, v in SEQ2SEQ.items() if k != "forced_eos_token_id"},
            max_source_positions=10,
            num_mel_bins=8,
        ),
    ),
    "t5": lambda: (
        hf.T5ForConditionalGeneration,
        hf.T5Config(
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            vocab_size=60,
            decoder_start_token_id=2,
            pad_token_id=0,
            eos_token_id=None,
        ),
    ),
}


def _through_the_interface(name: str) -> bool:
    """Older transformers have attention of their own in some families (T5, Swin, ModernBERT)."""
    return hasattr(sys.modules[BUILD[name]()[0].__module__], "ALL_ATTENTION_FUNCTIONS")


# Before 5.1 or later (5.0.0 and 5.23.0 were run): fewer families, masks asked for by position.
OLD = "cache_position" in inspect.signature(hf.masking_utils.sdpa_mask).parameters
FAMILIES = [name for name in BUILD if not OLD or _through_the_interface(name)]
DECODERS = ("llama", "qwen3", "mistral", "gemma3", "gpt2", "gpt_oss", "neox", "opt", "phi3")
DECODERS += ("llama4", "deepseek_v3")
EAGER_ONLY = ("gpt_oss",)
_QUERIES = ("q_proj.", "query.", "c_attn.", ".q.", "q_b_proj.", "attn.Wqkv.", "qkv_proj.")
_QUERIES += ("query_key_value.",)


_STRENGTH = {"deepseek_v3": 6.0, "whisper": 2.0, "clip": 0.05, "t5": 0.01}


def build(name: str, attention: str | None = None, sharpness: float = 250.0) -> nn.Module:
    """A tiny model of family `name` in eval mode, its query weights scaled by `sharpness`."""
    torch.manual_seed(0)
    kind, config = BUILD[name]()
    attention = attention or ("eager" if name in EAGER_ONLY else "sdpa")
    model: nn.Module = kind._from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(("relative_attention_bias.weight", "sinks", "bias_table")):
                parameter.normal_()
            elif any(part in f".{path}" for part in _QUERIES) and parameter.ndim >= 1:
                _queries_of(path, parameter).mul_(sharpness * _STRENGTH.get(name, 1.0))
            elif "q_norm" in path:  # queries are normalised: their length is this weight
                parameter.fill_(6.0 if name == "qwen3" else 30.0)
    return model


def _queries_of(path: str, parameter: Tensor) -> Tensor:
    """The part of a (possibly fused) projection that makes the queries."""
    third = parameter.shape[-1] // 3
    if "c_attn" in path:  # stored as (inputs, outputs)
        return parameter[..., :third]
    if "query_key_value" in path:  # head by head: query, key, value
        return parameter.view(4, 3, -1, *parameter.shape[1:])[:, 0]
    if "qkv_proj" in path:  # four query heads, two of keys, two of values
        return parameter[: parameter.shape[0] // 2]
    return parameter[: parameter.shape[0] // 3] if "Wqkv" in path else parameter


def inputs_of(name: str, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Deterministic inputs for family `name`."""
    gen = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 60, (batch, length), generator=gen)
    if name in ("vit", "dinov2"):
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=gen)}
    if name == "swin":
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=gen)}
    if name == "clip":
        pixels = torch.randn(batch, 3, 16, 16, generator=gen)
        return {"input_ids": tokens, "pixel_values": pixels}
    if name == "whisper":
        sound = torch.randn(batch, 8, 20, generator=gen)
        return {"input_features": sound, "decoder_input_ids": tokens[:, :4]}
    if name in ("bart", "t5"):
        return {"input_ids": tokens, "decoder_input_ids": tokens[:, :4]}
    return {"input_ids": tokens}


def masks(batch: int = 2, length: int = 9) -> dict[str, Tensor | None]:
    """2-D masks: none, all ones, padding left, right and scattered (the first row stays full)."""
    left, right, holes = (torch.ones(batch, length, dtype=torch.long) for _ in range(3))
    left[-1, :3] = 0
    right[-1, -3:] = 0
    holes[-1, [0, 3, 4, 7]] = 0
    full = torch.ones(batch, length, dtype=torch.long)
    return {"none": None, "ones": full, "left": left, "right": right, "scattered": holes}


def outputs(result: Any) -> list[Tensor]:
    """Every tensor of a model's output."""
    if isinstance(result, Tensor):
        return [result]
    found: list[Tensor] = []
    values = result.values() if hasattr(result, "values") else result
    if isinstance(values, (list, tuple)) or hasattr(values, "__iter__"):
        for value in values:
            if isinstance(value, (Tensor, list, tuple)) or hasattr(value, "to_tuple"):
                found += outputs(value)
    return found


def same(first: Any, second: Any) -> bool:
    """Whether all tensors of two outputs are equal bit for bit, NaN included."""
    ours, theirs = outputs(first), outputs(second)
    assert ours
    assert len(ours) == len(theirs)
    return all(
        one.shape == two.shape and torch.equal(one.nan_to_num(7.0), two.nan_to_num(7.0))
        for one, two in zip(ours, theirs, strict=True)
    )


class See:
    """An observer that looks at everything a call offers and checks it against dense float64."""

    role = "see"

    def __init__(self, tolerance: float = 2e-5) -> None:
        self.tolerance = tolerance
        self.calls: list[dict[str, Any]] = []
        self.began: list[int] = []
        self.ended: list[int] = []
        self.entropies: list[Tensor] = []

    def begin_forward(self, forward: int) -> None:
        self.began.append(forward)

    def end_forward(self, forward: int) -> None:
        self.ended.append(forward)

    def see(self, call: Any, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        output_wanted, lse_wanted, weights, seen = dense(call)
        scale = float(call.value.abs().max()) + 1e-9
        error = (output.double() - output_wanted).abs().amax(-1).transpose(1, 2)[seen]
        assert extra is not None or not error.numel() or float(error.max()) < self.tolerance * scale
        if lse is not None:
            assert lse.shape == lse_wanted.shape
            assert torch.equal(lse == -torch.inf, ~seen)
            assert float((lse.double() - lse_wanted)[seen].abs().max()) < 1e-3
        entropy = -(weights * weights.clamp_min(1e-300).log()).sum(-1)
        visible = (weights > 0).sum(-1)
        self.entropies.append((entropy[visible > 1] / visible[visible > 1].log()).detach())
        self.calls.append(
            {
                "site": call.site,
                "forward": call.forward,
                "phase": call.phase,
                "past": call.past,
                "queries": call.query_positions.tolist(),
                "keys": call.key_positions.tolist(),
                "lse": lse is not None,
                "sizes": (call.query.shape[2], call.key.shape[2]),
                "bias": call.bias,
                "sink": call.sink,
            }
        )

    def of(self, layer: int = 0, tower: str = "text") -> list[dict[str, Any]]:
        return [
            one for one in self.calls if (one["site"].tower, one["site"].layer) == (tower, layer)
        ]


def dense(call: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, log-sum-exp, weights, rows with a visible key: the plain definition in float64."""
    query, key, value = (one.detach().double() for one in (call.query, call.key, call.value))
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * call.scale
    if call.bias is not None:
        scores = scores + call.bias.dense().double()
    if call.sink is not None:
        sink = call.sink.detach().double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    seen = (scores > -torch.inf).any(-1)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(~seen, math.inf)[..., None]).nan_to_num(0.0)
    weights = weights[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), lse, weights, seen


class Push:
    """An editor that adds a log-bias to the first key of every layer, densely."""

    role = "edit"

    def __init__(self, shift: float = 2.0) -> None:
        self.shift = shift
        self.seen: list[tuple[Any, bool]] = []

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...

    @staticmethod
    def compute(call: Any, editors: list[Any]) -> tuple[Tensor | None, Any, Any, str]:
        from attnbias import KeyBias

        shift = sum(editor.shift for editor in editors)
        for editor in editors:
            editor.seen.append((call.site, call.recomputed))
        if shift == 0:
            return None, None, call, ""
        extra = KeyBias((torch.arange(call.key.shape[2]) == 0) * float(shift))
        group = call.query.shape[1] // call.key.shape[1]
        key, value = call.key.repeat_interleave(group, 1), call.value.repeat_interleave(group, 1)
        scores = call.query @ key.transpose(-1, -2) * call.scale + extra.dense()
        if call.bias is not None:
            scores = scores + call.bias.dense()
        if call.sink is not None:
            sink = call.sink[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], -1)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)[..., : key.shape[2]]
        return (weights @ value).transpose(1, 2).to(call.query.dtype), extra, call, ""


def state(model: nn.Module) -> dict[str, Any]:
    """Everything a context may touch: configs, module dictionaries, hooks, registries."""
    from transformers import masking_utils, modeling_utils

    modules = {}
    for path, module in model.named_modules():
        plain = {}
        for key, value in vars(module).items():
            if isinstance(value, dict):
                plain[key] = [(k, id(v)) for k, v in value.items()]
            elif isinstance(value, (int, float, str, bool, tuple, type(None))):
                plain[key] = copy.deepcopy(value)
            else:
                plain[key] = id(value)
        config = getattr(module, "config", None)
        settings = {
            key: repr(value) for key, value in (vars(config) if config is not None else {}).items()
        }
        modules[path] = (plain, settings)
    attention, mask = (
        modeling_utils.ALL_ATTENTION_FUNCTIONS,
        masking_utils.ALL_MASK_ATTENTION_FUNCTIONS,
    )
    tables = [
        list(table.items())
        for one in (attention, mask)
        for table in (one._global_mapping, one._local_mapping)
    ]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return {"modules": modules, "tables": tables, "weights": weights}


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    for key in before["weights"]:
        assert torch.equal(before["weights"][key], after["weights"][key]), key
    for path in before["modules"]:
        assert before["modules"][path] == after["modules"][path], path
    assert before["tables"] == after["tables"]
    return before["modules"].keys() == after["modules"].keys()
