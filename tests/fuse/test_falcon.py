"""Falcon with ALiBi, fused beside stock."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import Refused
from attnbias.fuse.find import find
from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Checkpointed, Generating, Mapped, Padded, Pretrained

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "alibi": True,
    "multi_query": False,
    "parallel_attn": False,
    "bias": True,
    "attention_dropout": 0.1,
    "hidden_dropout": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


class Alibi(Padded, Mapped, Generating):
    tables = r"$none"
    sharp = r"query_key_value\.weight"
    side = "left"
    dropout_names: ClassVar[tuple[str, ...]] = ("attention_dropout", "hidden_dropout")
    more: ClassVar[dict[str, Any]] = {}

    def build(self, **changes: Any) -> nn.Module:
        from transformers import FalconConfig, FalconForCausalLM

        model: nn.Module = FalconForCausalLM(FalconConfig(**{**SMALL, **self.more, **changes}))
        return model

    @contextlib.contextmanager
    def without(self, model: nn.Module) -> Iterator[None]:
        from transformers.models.falcon import modeling_falcon

        def flat(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(mask.shape[0] * heads, 1, mask.shape[1], dtype=dtype)

        with mock.patch.object(modeling_falcon, "build_alibi_tensor", flat):
            yield


class TestFalcon(Alibi, Checkpointed, Pretrained):
    pass


class TestFalconOfOneKeyHead(Alibi):
    sharpness = 2.0
    more: ClassVar[dict[str, Any]] = {"multi_query": True}


class TestFalconOfNewArchitecture(Alibi):
    more: ClassVar[dict[str, Any]] = {
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "num_kv_heads": 2,
    }


class TestFalconEager(Alibi):
    """The eager code adds ALiBi twice."""

    sharpness = 2.0

    def build(self, **changes: Any) -> nn.Module:
        from transformers import FalconConfig, FalconForCausalLM

        config = FalconConfig(**{**SMALL, **changes})
        model: Any = FalconForCausalLM._from_config(config, attn_implementation="eager")
        assert model.config._attn_implementation == "eager"
        found: nn.Module = model
        return found

    def test_half_precision(self) -> None:
        """This code rounds the weights to bfloat16: a check on random input may refuse it."""
        half = self.model().to(torch.bfloat16)
        given = self.inputs(2, self.length)
        wanted = self.run(half, given).float()
        exact = self.run(copy.deepcopy(half).float(), given)
        with ab.fuse(half, quiet=True, measure=False, check=False):
            found = self.run(half, given).float()
        assert self.off(found, exact) <= 1.5 * self.off(wanted, exact) + 1e-2


def test_rotary_is_refused() -> None:
    from transformers import FalconConfig, FalconModel

    model = FalconModel(FalconConfig(**{**SMALL, "alibi": False}))
    assert any("rotary positions and no bias" in reason for _, reason in find(model).left)
    with pytest.raises(Refused):
        ab.fuse(model, quiet=True)
