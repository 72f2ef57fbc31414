"""Bloom, fused beside stock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor, nn

from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Checkpointed, Generating, Mapped, Padded, Pretrained

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "n_head": 4,
    "n_layer": 2,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


class TestBloom(Padded, Mapped, Checkpointed, Pretrained, Generating):
    tables = r"$none"
    sharp = r"query_key_value\.weight"
    sharpness = 2.0
    side = "left"
    dropout_names: ClassVar[tuple[str, ...]] = ("attention_dropout", "hidden_dropout")

    def build(self, **changes: Any) -> nn.Module:
        from transformers import BloomConfig, BloomForCausalLM

        model: nn.Module = BloomForCausalLM(BloomConfig(**{**SMALL, **changes}))
        return model

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        from transformers.models.bloom import modeling_bloom

        def slopes(heads: int, device: Any) -> Tensor:
            return torch.zeros(heads, device=device)

        def flat(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(mask.shape[0] * heads, 1, mask.shape[1], dtype=dtype)

        # Older versions make their numbers in one function.
        new = hasattr(modeling_bloom, "_get_alibi_slopes")
        given = ("_get_alibi_slopes", slopes) if new else ("build_alibi_tensor", flat)
        with mock.patch.object(modeling_bloom, *given):
            yield
