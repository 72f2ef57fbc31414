"""Models with sink logits, fused beside stock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import attnbias as ab
from attnbias.errors import Refused
from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Checkpointed, Generating, Mapped, Padded, Pretrained, Trained

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "sliding_window": 16,
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


class Sinks(Padded):
    tables = r"sinks"
    sharp = r"(q|k)_proj\.weight"
    sharpness = 1.5
    side = "left"
    dropout_names: ClassVar[tuple[str, ...]] = ("attention_dropout",)

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        with super().without(model), torch.no_grad():
            for _, one in self.biases(model):
                one.fill_(-1e4)
            yield


class TestGptOss(Sinks, Mapped, Checkpointed, Pretrained, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import GptOssConfig, GptOssForCausalLM

        more = {"num_local_experts": 2, "num_experts_per_tok": 2}
        model: nn.Module = GptOssForCausalLM(GptOssConfig(**{**SMALL, **more, **changes}))
        return model


class TestFlint(Sinks, Trained, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import FlintConfig, FlintForCausalLM

        model: nn.Module = FlintForCausalLM(FlintConfig(**{**SMALL, **changes}))
        return model


class TestMiMo(Sinks, Trained, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import MiMoV2FlashConfig, MiMoV2FlashForCausalLM

        model: nn.Module = MiMoV2FlashForCausalLM(MiMoV2FlashConfig(**{**SMALL, **changes}))
        return model


class TestGraniteSWA(Sinks, Trained, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import GraniteSWAConfig, GraniteSWAForCausalLM

        model: nn.Module = GraniteSWAForCausalLM(GraniteSWAConfig(**{**SMALL, **changes}))
        return model


class TestGraniteMoeSWA(Sinks, Trained, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import GraniteMoeSWAConfig, GraniteMoeSWAForCausalLM

        model: nn.Module = GraniteMoeSWAForCausalLM(GraniteMoeSWAConfig(**{**SMALL, **changes}))
        return model


class TestPrivacyFilter(Sinks, Trained):
    side = "right"
    sharpness = 1.0

    def build(self, **changes: Any) -> nn.Module:
        from transformers import OpenAIPrivacyFilterConfig, OpenAIPrivacyFilterModel

        more = {"num_local_experts": 2, "num_experts_per_tok": 2}
        model: nn.Module = OpenAIPrivacyFilterModel(
            OpenAIPrivacyFilterConfig(**{**SMALL, **more, **changes})
        )
        return model


def test_sdpa_drops_the_sinks() -> None:
    model = TestGptOss().build()
    vars(model.config)["_attn_implementation_internal"] = "sdpa"
    with pytest.raises(Refused, match="only eager attention has its sinks"):
        ab.fuse(model, quiet=True)
