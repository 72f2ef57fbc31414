"""Small models of every kind that rules must work on, with sharpened heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

VOCABULARY = 97


@dataclass
class Subject:
    """A model with inputs, and what a test must know of it."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    towers: tuple[str, ...] | None = None
    causal: bool = False
    decoder: bool = False  # it generates, with a cache
    extra: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module | None = None, **inputs: Any) -> Tensor:
        """The logits (or last hidden states)."""
        given = {**self.inputs, **inputs}
        found = (self.model if model is None else model)(**given)
        out: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return out

    def eager(self) -> nn.Module:
        """A copy of the model that runs the eager attention of its own file."""
        other = copy.deepcopy(self.model)
        other.set_attn_implementation("eager")
        return other


def tokens(rows: int = 2, length: int = 13, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


def redraw(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that matter: matrices with outputs of size one, biases and tables N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                fan = weight[0].numel()
                scale = 1.0 if "embed" in name else fan**-0.5
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            elif "sinks" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def sharpen(model: nn.Module, factor: float) -> nn.Module:
    """Scale the queries of every second head, so that at least a quarter attends narrowly."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rsplit(".", 1)[-1] in ("q_proj", "query") and isinstance(module, nn.Linear):
                parent = model.get_submodule(name.rpartition(".")[0])
                width = getattr(parent, "head_dim", None) or parent.attention_head_size
                for head in range(0, module.out_features // width, 2):
                    part = slice(head * width, (head + 1) * width)
                    module.weight[part] *= factor
                    if module.bias is not None:
                        module.bias[part] *= factor
    return model


def stories(folder: Path) -> Subject:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokens(2, 13)
    ids[:, 0] = 1
    return Subject("stories", sharpen(model, 3.0), {"input_ids": ids}, None, True, True)


def minilm(folder: Path) -> Subject:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    return Subject("minilm", sharpen(model, 4.0), {"input_ids": 1000 + tokens()})


def vit() -> Subject:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        num_labels=7,
    )
    model = redraw(ViTForImageClassification(config)).eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    return Subject("vit", sharpen(model, 5.0), {"pixel_values": pixels})


def mistral() -> Subject:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        sliding_window=6,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = redraw(MistralForCausalLM(config)).eval()
    return Subject("mistral", sharpen(model, 5.0), {"input_ids": tokens()}, None, True, True)


def gpt_oss() -> Subject:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = redraw(GptOssForCausalLM(config)).eval()
    model.set_attn_implementation("eager")
    return Subject("gpt_oss", sharpen(model, 5.0), {"input_ids": tokens()}, None, True, True)


def bart(tower: str) -> Subject:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        dropout=0.0,
        attention_dropout=0.0,
    )
    model = redraw(BartForConditionalGeneration(config)).eval()
    inputs = {"input_ids": tokens(), "decoder_input_ids": tokens(2, 9, seed=5)}
    return Subject(f"bart {tower}", sharpen(model, 5.0), inputs, (tower,), tower == "decoder")


MAKERS: dict[str, Callable[[], Subject]] = {
    "vit": vit,
    "mistral": mistral,
    "gpt_oss": gpt_oss,
    "bart encoder": lambda: bart("encoder"),
    "bart decoder": lambda: bart("decoder"),
    "bart cross": lambda: bart("cross"),
}
NAMES = ("stories", "minilm", *MAKERS)
DECODERS = ("stories", "mistral", "gpt_oss")


def make(name: str, request: pytest.FixtureRequest) -> Subject:
    """A subject by name; the trained ones skip where their folder is missing."""
    if name == "stories":
        return stories(request.getfixturevalue("stories"))
    if name == "minilm":
        return minilm(request.getfixturevalue("minilm"))
    return MAKERS[name]()
