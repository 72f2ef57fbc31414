"""BEiT and Data2Vec for images, fused beside stock."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.cases.fuse_parts import Checkpointed, Mapped, Pretrained

SMALL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "drop_path_rate": 0.0,
    "layer_scale_init_value": 0.5,
}


class Images:
    """Inputs are images; a `length` is their height, odd widths beside."""

    sharp: ClassVar[str] = r"(q_proj|k_proj|query|key)\.weight"
    tables: ClassVar[str] = r"relative_position_bias_table"
    sharpness: ClassVar[float] = 20.0
    dropout_names: ClassVar[tuple[str, ...]] = (
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "drop_path_rate",
    )

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        height = max(length, 4)
        return {"pixel_values": torch.randn(batch, 3, height, height + 7)}


class TestBeit(Images, Mapped, Checkpointed, Pretrained):
    """A table of each layer."""

    def build(self, **changes: Any) -> nn.Module:
        from transformers import BeitConfig, BeitModel

        own = {"use_relative_position_bias": True}
        model: nn.Module = BeitModel(BeitConfig(**{**SMALL, **own, **changes}))
        return model


class TestBeitBoth(Images, Mapped, Checkpointed, Pretrained):
    """A table of each layer and one of all."""

    def build(self, **changes: Any) -> nn.Module:
        from transformers import BeitConfig, BeitModel

        own = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
        model: nn.Module = BeitModel(BeitConfig(**{**SMALL, **own, **changes}))
        return model


class TestData2VecVision(Images, Checkpointed, Pretrained):
    """A table of each layer and one of all."""

    implementation: ClassVar[str] = "sdpa"

    def build(self, **changes: Any) -> nn.Module:
        from transformers import Data2VecVisionConfig, Data2VecVisionModel

        own = {"use_relative_position_bias": True, "use_shared_relative_position_bias": True}
        config = Data2VecVisionConfig(**{**SMALL, **own, **changes})
        model: nn.Module = Data2VecVisionModel._from_config(
            config, attn_implementation=self.implementation
        )
        return model


class TestData2VecVisionEager(Mapped, TestData2VecVision):
    """Its other class of attention."""

    implementation: ClassVar[str] = "eager"
