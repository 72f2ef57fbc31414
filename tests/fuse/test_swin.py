"""Swin and its copies, fused beside stock."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tests.cases.fuse_parts import Checkpointed, Mapped, Pretrained

SMALL = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}


class Images:
    """Inputs are images; a `length` is their height, odd widths beside."""

    sharp: ClassVar[str] = r"(q_proj|k_proj|query|key)\.weight"
    sharpness: ClassVar[float] = 30.0
    dropout_names: ClassVar[tuple[str, ...]] = (
        "attention_probs_dropout_prob",
        "hidden_dropout_prob",
        "drop_path_rate",
    )
    patch: ClassVar[int] = 2
    least: ClassVar[int] = 2 * 2 * 5  # sides of an image whose maps are all larger than a window

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        height = max(length, self.least)
        return {"pixel_values": torch.randn(batch, 3, height, height + 7)}


class TestSwin(Images, Mapped, Checkpointed, Pretrained):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import SwinConfig, SwinModel

        dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
        model: nn.Module = SwinModel(SwinConfig(**{**SMALL, **dropout, **changes}))
        return model


class TestDonutSwin(Images, Mapped, Checkpointed, Pretrained):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import DonutSwinConfig, DonutSwinModel

        dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
        model: nn.Module = DonutSwinModel(DonutSwinConfig(**{**SMALL, **dropout, **changes}))
        return model


class TestMaskFormerSwin(Images, Checkpointed, Pretrained):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import MaskFormerSwinConfig
        from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel

        dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
        config = MaskFormerSwinConfig(**{**SMALL, **dropout, **changes})
        model: nn.Module = MaskFormerSwinModel(config)
        return model


class TestSwinV2(Images, Mapped, Checkpointed, Pretrained):
    tables: ClassVar[str] = r"continuous_position_bias_mlp\.2"
    sharp: ClassVar[str] = r"logit_scale"
    sharpness: ClassVar[float] = 1.05

    def build(self, **changes: Any) -> nn.Module:
        from transformers import Swinv2Config, Swinv2Model

        dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
        model: nn.Module = Swinv2Model(Swinv2Config(**{**SMALL, **dropout, **changes}))
        return model


class TestSwin2SR(Images, Checkpointed, Pretrained):
    tables: ClassVar[str] = r"continuous_position_bias_mlp\.2"
    sharp: ClassVar[str] = r"logit_scale"
    sharpness: ClassVar[float] = 1.05

    def build(self, **changes: Any) -> nn.Module:
        from transformers import Swin2SRConfig, Swin2SRModel

        dropout = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.1}
        config = Swin2SRConfig(**{**SMALL, "patch_size": 1, **dropout, **changes})
        model: nn.Module = Swin2SRModel(config)
        return model

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        size = -(-max(length // 2, 8) // 4) * 4  # the stock code takes multiples of the window
        return {"pixel_values": torch.randn(batch, 3, size, size + 4)}


class TestClapAudio(Images, Pretrained):
    """A map of frequencies and time in place of an image, with batch norm before it."""

    def build(self, **changes: Any) -> nn.Module:
        from transformers import ClapAudioConfig, ClapAudioModel

        config = ClapAudioConfig(
            **{
                "window_size": 4,
                "spec_size": 32,
                "num_mel_bins": 16,
                "patch_size": 2,
                "patch_stride": [2, 2],
                "patch_embeds_hidden_size": 16,
                "hidden_size": 64,
                "depths": [2, 2],
                "num_attention_heads": [2, 4],
                "drop_path_rate": 0.0,
                "enable_fusion": False,
                "attention_probs_dropout_prob": 0.1,
                "hidden_dropout_prob": 0.1,
                **changes,
            }
        )
        model: nn.Module = ClapAudioModel(config)
        return model

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        return {"input_features": torch.randn(batch, 1, max(8, min(length, 64)), 16)}
