"""Models that share T5's attention, each through its own class, fused beside stock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import attnbias as ab
from tests.cases.fuse import VOCABULARY, FuseCase
from tests.cases.fuse_parts import Checkpointed, Generating, Mapped, Padded, Pretrained, Trained
from tests.fuse.test_t5 import SMALL


class Whole(FuseCase):
    """All of its attention with a table, and what reuses it, is fused."""

    def test_nothing_is_left(self) -> None:
        with ab.fuse(self.model(), quiet=True, measure=False) as fused:
            assert fused.left == []
            assert max(one.difference for one in fused.sites) <= 1e-5


class Translating(Whole, Padded, Mapped, Generating):
    """An encoder and a decoder, both fed with tokens."""

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        given = super().inputs(batch, length)
        return {**given, "decoder_input_ids": torch.randint(1, VOCABULARY, (batch, length))}

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        return super().generate(model, {"input_ids": given["input_ids"]})


class TestMT5(Translating, Checkpointed):
    sharpness = 5.0

    def build(self, **changes: Any) -> nn.Module:
        from transformers import MT5Config, MT5ForConditionalGeneration

        return MT5ForConditionalGeneration(MT5Config(**{**SMALL, **changes}))


class TestUMT5(Translating, Checkpointed, Pretrained):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import UMT5Config, UMT5ForConditionalGeneration

        return UMT5ForConditionalGeneration(UMT5Config(**{**SMALL, **changes}))


class TestUMT5Encoder(Whole, Padded, Mapped):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import UMT5Config, UMT5EncoderModel

        return UMT5EncoderModel(UMT5Config(**{**SMALL, **changes}))


class TestSwitch(Translating, Checkpointed, Pretrained):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import (
            SwitchTransformersConfig,
            SwitchTransformersForConditionalGeneration,
        )

        more = {"num_decoder_layers": 2, "num_experts": 2, "router_jitter_noise": 0.0}
        more |= {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
        config = SwitchTransformersConfig(**{**SMALL, **more, **changes})
        model = SwitchTransformersForConditionalGeneration(config)
        with torch.no_grad():  # its routers remember the dtype of their first call
            model(**self.inputs(1, 3))
        return model


class TestPop2Piano(Translating, Trained):
    """Fed with features; its decoder is fed with tokens."""

    def build(self, **changes: Any) -> nn.Module:
        from transformers import Pop2PianoConfig, Pop2PianoForConditionalGeneration

        more = {"composer_vocab_size": 2}
        config = Pop2PianoConfig(**{**SMALL, **more, **changes})
        model = Pop2PianoForConditionalGeneration(config)
        model.generation_config.composer_to_feature_token = {"one": 0, "two": 1}
        return model

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        given = super().inputs(batch, length)
        del given["input_ids"]
        return {**given, "inputs_embeds": torch.randn(batch, length, SMALL["d_model"])}

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        given = {"input_features": given["inputs_embeds"], "composer": "two"}  # type: ignore[dict-item]
        return Generating.generate(self, model, given)


class TestPix2Struct(Whole, Padded, Trained, Generating):
    """Fed with patches of a picture, of which a few are padding."""

    sharp = r"(self_attention|encoder_decoder_attention)\.attention\.query\.weight"
    dropout_names = ("dropout_rate",)

    def build(self, **changes: Any) -> nn.Module:
        from transformers import Pix2StructConfig, Pix2StructForConditionalGeneration

        text = {
            "vocab_size": VOCABULARY, "hidden_size": 32, "d_kv": 8, "num_heads": 4,
            "num_layers": 2, "d_ff": 64, "decoder_start_token_id": 0, "pad_token_id": 0,
            "eos_token_id": 1, "is_decoder": True,
        }  # fmt: skip
        vision = {
            "hidden_size": 32, "patch_embed_hidden_size": 12, "d_ff": 64, "d_kv": 8,
            "num_hidden_layers": 1, "num_attention_heads": 4, "seq_len": 64,
        }  # fmt: skip
        if changes:
            vision |= {"dropout_rate": 0.0, "attention_dropout": 0.0}
        config = Pix2StructConfig(text_config={**text, **changes}, vision_config=vision)
        return Pix2StructForConditionalGeneration(config)

    def patches(self, batch: int) -> Tensor:
        """``(batch, patches, 2 + patch)``: row and column counted from 1, and numbers."""
        places = torch.cartesian_prod(torch.arange(1.0, 5), torch.arange(1.0, 8))
        return torch.cat([places.expand(batch, -1, -1), torch.randn(batch, 28, 12)], -1)

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        tokens = torch.randint(1, VOCABULARY, (batch, length))
        return {"flattened_patches": self.patches(batch), "decoder_input_ids": tokens}

    def padded(self, length: int) -> tuple[dict[str, Tensor], Tensor]:
        given = self.inputs(2, length)
        keep, real = torch.ones(2, 28, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
        keep[1, 20:], real[1, length - length // 3 :] = 0, 0
        more = {"attention_mask": keep, "decoder_attention_mask": real}
        return {**given, **more}, real.bool()

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        return super().generate(model, {"flattened_patches": given["flattened_patches"]})


class TestPix2StructText(Whole, Mapped):
    """The decoder alone, fed with what an encoder made."""

    sharp = TestPix2Struct.sharp
    sharpness = 8.0

    def build(self, **changes: Any) -> nn.Module:
        from transformers import Pix2StructTextConfig, Pix2StructTextModel

        more = {"hidden_size": 32, "is_decoder": True, "initializer_range": 0.02}
        given = {name: one for name, one in SMALL.items() if name != "d_model"}
        return Pix2StructTextModel(Pix2StructTextConfig(**{**given, **more, **changes}))

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        made = torch.randn(batch, length + 2, 32)
        return {**super().inputs(batch, length), "encoder_hidden_states": made}


class TestUdop(Padded, Trained, Generating):
    """Its decoder; its encoder, whose bias is of places on the page, is left alone."""

    def build(self, **changes: Any) -> nn.Module:
        from transformers import UdopConfig, UdopForConditionalGeneration

        more = {
            "relative_bias_args": [{"type": "1d"}, {"type": "horizontal"}, {"type": "vertical"}],
            "image_size": 16, "patch_size": 8, "max_2d_position_embeddings": 64,
        }  # fmt: skip
        return UdopForConditionalGeneration(UdopConfig(**{**SMALL, **more, **changes}))

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        given = super().inputs(batch, length)
        more = {"bbox": torch.rand(batch, length, 4).sort(-1).values}
        more["decoder_input_ids"] = torch.randint(1, VOCABULARY, (batch, length))
        return {**given, **more}

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        return super().generate(model, {name: given[name] for name in ("input_ids", "bbox")})

    def test_encoder_is_left_alone(self) -> None:
        with ab.fuse(self.model(), quiet=True, measure=False) as fused:
            pass
        assert any("encoder" in left.names[0] and "page" in left.reason for left in fused.left)
        assert all("decoder" in name for one in fused.sites for name in one.names)
