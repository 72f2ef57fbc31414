"""MPT, fused beside stock."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Checkpointed, Generating, Mapped, Padded, Pretrained

SMALL = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 256,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


class TestMpt(Padded, Mapped, Checkpointed, Pretrained, Generating):
    tables = r"$none"
    sharp = r"Wqkv\.weight"
    side = "left"
    dropout_names: ClassVar[tuple[str, ...]] = ("attn_pdrop",)

    def build(self, **changes: Any) -> nn.Module:
        from transformers import MptConfig, MptForCausalLM

        dropout = changes.pop("attn_pdrop", 0.1)
        model: Any = MptForCausalLM(MptConfig(**{**SMALL, **changes}))
        for block in model.transformer.blocks:  # this config takes whole numbers alone
            block.attn.attn_dropout_p = dropout
        found: nn.Module = model
        return found

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        body: Any = model.transformer

        def nothing(heads: int, length: int, *_: Any, **__: Any) -> Tensor:
            return torch.zeros(heads, 1, length)

        body.build_mpt_alibi_tensor = nothing
        try:
            yield
        finally:
            del body.build_mpt_alibi_tensor
