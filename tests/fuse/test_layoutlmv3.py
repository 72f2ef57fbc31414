"""LayoutLMv3 and LayoutLMv2, fused beside stock."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Mapped, Padded, Pretrained

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 200,
    "coordinate_size": 6,
    "shape_size": 6,
    "input_size": 32,
    "patch_size": 8,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}


def boxes(batch: int, length: int) -> Tensor:
    """Left, top, right, bottom of words on a page of 1,000."""
    first = torch.randint(0, 900, (batch, length, 2))
    return torch.cat([first, first + torch.randint(1, 100, (batch, length, 2))], -1)


class Document(Padded, Pretrained):
    tables: ClassVar[str] = r"rel_pos.*bias"
    sharp: ClassVar[str] = r"self\.query\.weight"
    sharpness: ClassVar[float] = 6.0
    dropout_names: ClassVar[tuple[str, ...]] = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        return {**super().inputs(batch, length), "bbox": boxes(batch, length)}


class TestText(Document, Mapped):
    """Words and boxes alone."""

    def build(self, **changes: Any) -> nn.Module:
        from transformers import LayoutLMv3Config, LayoutLMv3Model

        return LayoutLMv3Model(LayoutLMv3Config(**{**SMALL, **changes}))


class TestImage(Document):
    """Words, boxes and patches of the page."""

    def build(self, **changes: Any) -> nn.Module:
        from transformers import LayoutLMv3Config, LayoutLMv3ForTokenClassification

        return LayoutLMv3ForTokenClassification(LayoutLMv3Config(**{**SMALL, **changes}))

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        return {**super().inputs(batch, length), "pixel_values": torch.randn(batch, 3, 32, 32)}
