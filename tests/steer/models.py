"""Small models of every kind that rules must work on, with sharpened heads."""

from __future__ import annotations

import copy
import inspect
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
    spans: dict[str, Any] = field(default_factory=dict)  # of the text, where there are images
    length: int | None = None  # tokens that attend, where the inputs do not show it
    shares: dict[str, int] = field(default_factory=dict)  # inputs that hold several lines a row

    def run(self, model: nn.Module | None = None, **inputs: Any) -> Tensor:
        """The logits (or last hidden states)."""
        given = {**self.inputs, **inputs}
        found = (self.model if model is None else model)(**given)
        out: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return out

    def row(self, number: int, part: slice | None = None, **inputs: Any) -> dict[str, Tensor]:
        """The inputs of one row, its tokens cut to `part`."""
        given = {**self.inputs, **inputs}
        found = {}
        for name, value in given.items():
            size = self.shares.get(name, 1)
            found[name] = value[number * size : (number + 1) * size]
            if part is not None and value.shape == given["input_ids"].shape:
                found[name] = found[name][:, part]
        return found

    def swapped(self) -> dict[str, Tensor]:
        """The inputs with the rows in the other order."""
        rows = range(len(next(iter(self.inputs.values()))) - 1, -1, -1)
        parts = [self.row(number) for number in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in self.inputs}

    def changed(self) -> dict[str, Tensor]:
        """The inputs with another second row: its words backwards, or its image mirrored."""
        found = {name: value.clone() for name, value in self.inputs.items()}
        if not self.spans:
            return {name: torch.cat([v[:1], v[1:].flip(1)]) for name, v in found.items()}
        found["input_ids"][1, -5:] = found["input_ids"][1, -5:].flip(0)
        size = self.shares.get("pixel_values", 1)
        found["pixel_values"][size:] *= -1
        return found

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
                width = getattr(parent, "head_dim", None) or getattr(
                    parent, "attention_head_size", None
                )
                assert width, f"{name} does not tell the size of its heads"
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


def dinov2() -> Subject:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        mlp_ratio=2,
        image_size=16,
        patch_size=4,
        num_labels=7,
    )
    model = redraw(Dinov2ForImageClassification(config)).eval()
    return Subject("dinov2", sharpen(model, 5.0), {"pixel_values": pixels()}, length=17)


def clip_vision() -> Subject:
    from transformers import CLIPVisionModel

    model = redraw(CLIPVisionModel(clip_config())).eval()
    return Subject("clip vision", sharpen(model, 5.0), {"pixel_values": pixels()}, length=17)


def pixels(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def clip_config(**changes: Any) -> Any:
    from transformers import CLIPVisionConfig

    given = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
    }
    return CLIPVisionConfig(**{**given, **changes})


IMAGE, BEFORE, AFTER = 90, 91, 92  # an image's token, and the ones around it
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def words_and_image() -> Tensor:
    """Two rows of 16 tokens; the four at 2 to 5 are an image."""
    ids = tokens(2, 16) % 80 + 3
    ids[:, 0], ids[:, 1], ids[:, 2:6], ids[:, 6] = 1, BEFORE, IMAGE, AFTER
    return ids


def llava() -> Subject:
    """A CLIP tower of four patches before a Llama."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=clip_config(patch_size=8),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=4,
    )
    model = redraw(LlavaForConditionalGeneration(config)).eval()
    inputs = {"input_ids": words_and_image(), "pixel_values": pixels()}
    return vlm("llava", sharpen(model, 5.0), inputs)


def qwen2_vl() -> Subject:
    """Sixteen patches merged into four tokens, three-dimensional positions."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=93,
        vision_start_token_id=BEFORE,
        vision_end_token_id=AFTER,
    )
    model = redraw(Qwen2VLForConditionalGeneration(config)).eval()
    ids = words_and_image()
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "input_ids": ids,
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=generator),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:  # not at 5.0
        inputs["mm_token_type_ids"] = (ids == IMAGE).long()
    return vlm("qwen2_vl", sharpen(model, 5.0), inputs, shares={"pixel_values": 16})


def gemma3() -> Subject:
    """A SigLIP tower pooled to four tokens that see each other, a sliding and two full layers."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        **TEXT,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "tie_word_embeddings": False,
    }
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 4,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=BEFORE,
        eoi_token_index=AFTER,
        tie_word_embeddings=False,  # tied and random, a model says the last word again
    )
    model = redraw(Gemma3ForConditionalGeneration(config)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("q_norm.weight"):  # queries are normalised: this is their length
                weight.fill_(3.0)
        model.get_input_embeddings().weight.mul_(32**-0.5)  # it multiplies by the root of the size
    ids = words_and_image()
    inputs = {
        "input_ids": ids,
        "pixel_values": pixels(),
        "token_type_ids": (ids == IMAGE).long(),
    }
    return vlm("gemma3", model, inputs)


def vlm(name: str, model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Subject:
    spans = {"image": (2, 6), "question": (7, 16)}
    return Subject(name, model, inputs, ("text",), True, True, spans=spans, length=16, **more)


MAKERS: dict[str, Callable[[], Subject]] = {
    "vit": vit,
    "mistral": mistral,
    "gpt_oss": gpt_oss,
    "bart encoder": lambda: bart("encoder"),
    "bart decoder": lambda: bart("decoder"),
    "bart cross": lambda: bart("cross"),
    "dinov2": dinov2,
    "clip vision": clip_vision,
    "llava": llava,
    "qwen2_vl": qwen2_vl,
    "gemma3": gemma3,
}
VLMS = ("llava", "qwen2_vl", "gemma3")
VISION = ("dinov2", "clip vision", *VLMS)  # beside NAMES: not in every test, for time
NAMES = ("stories", "minilm", *(name for name in MAKERS if name not in VISION))
DECODERS = ("stories", "mistral", "gpt_oss")


def make(name: str, request: pytest.FixtureRequest) -> Subject:
    """A subject by name; the trained ones skip where their folder is missing."""
    if name == "stories":
        return stories(request.getfixturevalue("stories"))
    if name == "minilm":
        return minilm(request.getfixturevalue("minilm"))
    return MAKERS[name]()
