"""MPNet, fused beside stock."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from torch import nn

import attnbias as ab
from attnbias.errors import Refused
from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Mapped, Padded, Pretrained

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 200,
    "initializer_range": 0.2,
}


class TestMPNet(Padded, Mapped, Pretrained):
    sharp: ClassVar[str] = r"attn\.q\.weight"
    rounding: ClassVar[str] = r"attn\.k\.bias$"
    dropout_names: ClassVar[tuple[str, ...]] = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )

    def build(self, **changes: Any) -> nn.Module:
        from transformers import MPNetConfig, MPNetModel

        return MPNetModel(MPNetConfig(**{**SMALL, **changes}))

    def test_module_alone_is_refused(self) -> None:
        """The bias is made by the encoder: its attention alone has none."""
        model: Any = self.model()
        with pytest.raises(Refused, match="not part of an MPNetEncoder"):
            ab.fuse(model.encoder.layer[0].attention, quiet=True)
