"""LayoutLMv3 and LayoutLMv2, fused beside stock."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import Refused
from attnbias.fuse import modes
from attnbias.fuse.families import layoutlmv3
from tests.cases.fuse import VOCABULARY
from tests.cases.fuse_parts import Mapped, Padded, Pretrained, Trained

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

    def test_maps_are_stock(self) -> None:
        model = self.model()
        given = self.inputs(2, 9)
        with torch.no_grad():
            wanted = model(**given, output_attentions=True).attentions
            with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
                found = model(**given, output_attentions=True).attentions
        assert not seen
        assert len(found) == len(wanted) == 2
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))

    def test_large_bias_stays_a_structure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Beyond a few megabytes the bias of all pairs is built by no layer."""
        model = self.model()
        given, real = self.padded(self.length)
        wanted = self.run(model, given)
        kinds = {}
        for kept in (layoutlmv3.KEPT, 0):
            monkeypatch.setattr(layoutlmv3, "KEPT", kept)
            with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
                found = self.run(model, given)
            assert self.off(found[real], wanted[real]) <= self.tolerance
            kinds[kept] = seen[-1][0]
        assert kinds[0].count("GridRelative") == 3
        assert "Padding" in kinds[0]
        assert kinds[max(kinds)].startswith("Dense")

    def test_double_precision(self) -> None:
        model = self.model().double()
        given = self.padded(45)[0]
        given["pixel_values"] = given["pixel_values"].double()
        wanted = self.run(model, given)
        with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
            found = self.run(model, given)
        assert seen
        assert self.off(found, wanted) <= 1e-12

    def test_small_bias_is_built_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = self.model()
        with ab.fuse(model, quiet=True, measure=False):
            made = []
            before = layoutlmv3.LayoutLMv3.terms

            def counted(*given: Any) -> Any:
                made.append(1)
                return before(*given)

            monkeypatch.setattr(layoutlmv3.LayoutLMv3, "terms", counted)
            for _ in range(2):
                self.run(model, self.inputs(2, 33))
        assert len(made) == 2  # one for each forward, none for the second layer

    def test_tables_that_change_are_followed(self) -> None:
        model = self.model()
        given = self.inputs(2, 33)
        with ab.fuse(model, quiet=True, measure=False):
            before = self.run(model, given)
            with torch.no_grad():
                for _, one in self.biases(model):
                    one.mul_(-1.0)
            after = self.run(model, given)
        assert self.off(after, self.run(model, given)) <= self.tolerance
        assert self.off(after, before) >= 1e-2


class TestTextBiasAlone(TestText):
    """Without the bias of the page: the distance in the text is a line."""

    def build(self, **changes: Any) -> nn.Module:
        return super().build(has_spatial_attention_bias=False, **changes)


class Version2(nn.Module):
    """LayoutLMv2's encoder between embeddings: its model needs an image library of its own."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        from transformers import LayoutLMv2Config
        from transformers.models.layoutlmv2.modeling_layoutlmv2 import LayoutLMv2Encoder

        self.config = LayoutLMv2Config(**{**SMALL, **changes})
        self.embed = nn.Embedding(VOCABULARY, 36)
        self.encoder = LayoutLMv2Encoder(self.config)

    def forward(self, input_ids: Tensor, bbox: Tensor, attention_mask: Any = None) -> Any:
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.embed(input_ids)
        lowest = torch.finfo(hidden.dtype).min
        mask = (1.0 - keep[:, None, None].to(hidden)) * lowest
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        return self.encoder(hidden, mask, bbox=bbox, position_ids=positions)


class TestVersion2(Padded, Trained):
    tables: ClassVar[str] = r"rel_pos.*bias"
    sharp: ClassVar[str] = r"self\.query\.weight"
    sharpness: ClassVar[float] = 4.0
    dropout_names: ClassVar[tuple[str, ...]] = Document.dropout_names

    def build(self, **changes: Any) -> nn.Module:
        return Version2(**{**changes, "fast_qkv": False})

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        return {**super().inputs(batch, length), "bbox": boxes(batch, length)}


class TestVersion2OneProduct(TestVersion2):
    sharp: ClassVar[str] = r"qkv_linear"
    sharpness: ClassVar[float] = 2.0

    def build(self, **changes: Any) -> nn.Module:
        return Version2(**{**changes, "fast_qkv": True})


def test_encoder_of_another_kind_is_refused() -> None:
    from transformers import LayoutLMv3Config, LayoutLMv3Model
    from transformers.models.layoutlmv3.modeling_layoutlmv3 import LayoutLMv3Encoder

    class Other(LayoutLMv3Encoder):  # type: ignore[misc]
        def _cal_2d_pos_emb(self, bbox: Tensor) -> Any:
            return super()._cal_2d_pos_emb(bbox) * 2

    model = LayoutLMv3Model(LayoutLMv3Config(**SMALL)).eval()
    attention = model.encoder.layer[0].attention
    model.encoder = Other(model.config)
    with pytest.raises(Refused, match="its encoder has a method _cal_2d_pos_emb of its own"):
        ab.fuse(model, quiet=True)
    with pytest.raises(Refused, match="not part of a LayoutLMv3Encoder"):
        ab.fuse(attention, quiet=True)
