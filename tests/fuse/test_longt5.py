"""LongT5: local and transient-global attention, fused beside stock."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Checkpointed, Generating, Padded, Pretrained

SMALL = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": 2,
    "d_ff": 64,
    "local_radius": 7,
    "global_block_size": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}


class Local(Padded, Checkpointed, Pretrained):
    kind: ClassVar[str] = "local"

    def build(self, **changes: Any) -> nn.Module:
        from transformers import LongT5Config, LongT5EncoderModel

        changes = {"encoder_attention_type": self.kind, **changes}
        return LongT5EncoderModel(LongT5Config(**{**SMALL, **changes}))


class TestLocal(Local):
    pass


class TestGlobal(Local):
    kind = "transient-global"


class Whole(Local, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import LongT5Config, LongT5ForConditionalGeneration

        changes = {"encoder_attention_type": self.kind, **changes}
        return LongT5ForConditionalGeneration(LongT5Config(**{**SMALL, **changes}))

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        given = super().inputs(batch, length)
        return {**given, "decoder_input_ids": torch.randint(1, VOCABULARY, (batch, length))}

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        return super().generate(model, {"input_ids": given["input_ids"]})


class TestLocalWhole(Whole):
    pass


class TestGlobalWhole(Whole):
    kind = "transient-global"
