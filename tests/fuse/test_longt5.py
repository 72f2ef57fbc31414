"""LongT5: local and transient-global attention, fused beside stock."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
import torch.utils._python_dispatch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import Refused
from attnbias.fuse import modes
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


class Base(Padded, Checkpointed, Pretrained):
    kind: ClassVar[str] = "local"

    def build(self, **changes: Any) -> nn.Module:
        from transformers import LongT5Config, LongT5EncoderModel

        changes = {"encoder_attention_type": self.kind, **changes}
        return LongT5EncoderModel(LongT5Config(**{**SMALL, **changes}))


class Local(Base):
    """The encoder alone."""

    def everywhere(self, mask: Tensor) -> float:
        """Largest difference from stock, at padded tokens too."""
        model = self.model()
        given = {**self.inputs(*mask.shape), "attention_mask": mask}
        wanted = self.run(model, given)
        with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
            found = self.run(model, given)
        assert seen
        return self.off(found, wanted)

    @pytest.mark.parametrize("length", [3, 4, 7, 8, 9, 15, 16, 24, 40, 97])
    def test_edges_of_blocks(self, length: int) -> None:
        assert self.everywhere(torch.ones(2, length, dtype=torch.long)) <= self.tolerance

    @pytest.mark.parametrize("side", ["right", "left", "short", "scattered", "nearly", "float"])
    def test_padding_of_all_kinds(self, side: str) -> None:
        """Also at the padded tokens, whose output the stock code makes of unseen keys."""
        mask = torch.ones(3, 45, dtype=torch.float32 if side == "float" else torch.long)
        if side in ("right", "float"):
            mask[1, 23:] = 0
            mask[2, 40:] = 0
        elif side == "left":
            mask[1, :23] = 0
            mask[2, :5] = 0
        elif side == "short":  # not even one block of sums
            mask[1, 2:] = 0
        elif side == "nearly":  # all sums are real, one token is none
            mask[:, 44:] = 0
        else:
            mask[1:] = (torch.rand(2, 45) < 0.5).long()
            mask[1:, 0] = 1
        assert self.everywhere(mask) <= self.tolerance

    def test_other_formats_are_refused(self) -> None:
        """The stock code takes its softmax in float32: in float64 nothing equals it to 1e-8."""
        model = self.model().double()
        with pytest.raises(Refused, match=r"weights in torch\.float64"):
            ab.fuse(model, quiet=True)

    def test_maps_are_stock(self) -> None:
        model = self.model()
        given = self.inputs(2, 21)
        with torch.no_grad():
            wanted = model(**given, output_attentions=True).attentions
            with ab.fuse(model, quiet=True, measure=False), modes.recording() as seen:
                found = model(**given, output_attentions=True).attentions
        assert not seen
        assert len(found) == len(wanted) == 2
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)

    def test_a_stock_layer_after_a_fused_one(self) -> None:
        """A layer that another library has changed reads the tensor of blocks, as ever."""
        model: Any = self.model()
        given = self.padded(45)[0]
        wanted = self.run(model, given)
        last = model.encoder.block[1].layer[0]
        module = (
            last.LocalSelfAttention if self.kind == "local" else last.TransientGlobalSelfAttention
        )
        module.forward = type(module).forward.__get__(module)
        with ab.fuse(model, quiet=True, measure=False) as fused:
            assert "another library" in str(fused)
            found = self.run(model, given)
        assert self.off(found, wanted) <= self.tolerance

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointing_of_padded_rows(self, reentrant: bool) -> None:
        """The table is shared by all layers: its gradient comes from each of them."""
        model: Any = self.model(dropout_rate=0.0).train()
        given, real = self.padded(45)

        def gradients() -> dict[str, Tensor]:
            model.zero_grad()
            embeds = model.get_input_embeddings()(given["input_ids"])
            out = model(inputs_embeds=embeds, attention_mask=given["attention_mask"])
            out = out.last_hidden_state[real]
            (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
            return {
                name: one.grad.clone()
                for name, one in model.named_parameters()
                if one.grad is not None
            }

        wanted = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
            found = gradients()
        assert found.keys() == wanted.keys()
        for name, one in wanted.items():
            assert self.off(found[name], one) <= 1e-4, name


class TestLocal(Local):
    def test_wrapped_table_is_refused(self) -> None:
        class Scaled(nn.Embedding):
            def forward(self, index: Tensor) -> Tensor:
                return 2 * super().forward(index)

        model: Any = self.model(num_layers=1)
        table = model.encoder.block[0].layer[0].LocalSelfAttention
        table.relative_attention_bias = Scaled(32, 4)
        with pytest.raises(Refused, match="a Scaled in place of a plain"):
            ab.fuse(model, quiet=True)


class TestGlobal(Local):
    kind = "transient-global"

    def test_sums_alone_matter(self) -> None:
        model: Any = self.model()
        given = self.inputs(2, 45)
        table = model.encoder.block[0].layer[0].TransientGlobalSelfAttention
        wanted = self.run(model, given)
        with torch.no_grad():
            table.global_relative_attention_bias.weight.zero_()
        assert self.off(self.run(model, given), wanted) >= 1e-2
        with ab.fuse(model, quiet=True, measure=False):
            assert self.off(self.run(model, given), wanted) >= 1e-2

    def test_nothing_of_all_pairs(self) -> None:
        """Longest tensor of a fused call: far below tokens times tokens, or times sums."""
        model: Any = self.model(num_layers=1)
        given = self.inputs(1, 2048)
        largest = 0

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                nonlocal largest
                out = function(*args, **(kwargs or {}))
                if isinstance(out, Tensor):
                    largest = max(largest, out.untyped_storage().nbytes() // out.element_size())
                return out

        with ab.fuse(model, quiet=True, measure=False), torch.no_grad():
            model(**self.inputs(1, 64))  # buffers that are kept
            with Watch():
                model(**given)
        assert largest <= 2**20 + 2**16, "more than a tile"


class Whole(Base, Generating):
    def build(self, **changes: Any) -> nn.Module:
        from transformers import LongT5Config, LongT5ForConditionalGeneration

        changes = {"encoder_attention_type": self.kind, **changes}
        return LongT5ForConditionalGeneration(LongT5Config(**{**SMALL, **changes}))

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        given = super().inputs(batch, length)
        return {**given, "decoder_input_ids": torch.randint(1, VOCABULARY, (batch, length))}

    def generate(self, model: Any, given: dict[str, Tensor]) -> Any:
        return super().generate(model, {"input_ids": given["input_ids"]})

    @pytest.mark.parametrize(
        "how", [{"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]
    )
    def test_generation_of_other_kinds(self, how: dict[str, Any]) -> None:
        model: Any = self.model()
        given = {name: one for name, one in self.padded(45)[0].items() if "decoder" not in name}
        more = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, **how}
        wanted = model.generate(**given, **more)
        with ab.fuse(model, quiet=True, measure=False), modes.taking("fused"):
            found = model.generate(**given, **more)
        assert torch.equal(found, wanted)


class TestLocalWhole(Whole):
    pass


class TestGlobalWhole(Whole):
    kind = "transient-global"
