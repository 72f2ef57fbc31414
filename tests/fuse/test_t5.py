"""T5 and the models that share its attention, fused beside stock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Checkpointed, Generating, Mapped, Padded, Pretrained

SMALL = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 64,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


class TestT5Encoder(Padded, Mapped, Checkpointed, Pretrained):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        return T5EncoderModel(T5Config(**{**SMALL, **changes}))


class TestT5(Padded, Mapped, Checkpointed, Pretrained, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        return T5ForConditionalGeneration(T5Config(**{**SMALL, **changes}))

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        given = super().inputs(batch, length)
        return {**given, "decoder_input_ids": torch.randint(1, VOCABULARY, (batch, length))}

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        return super().generate(model, {"input_ids": given["input_ids"]})
