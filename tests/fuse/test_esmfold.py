"""ESMFold's trunk, fused beside stock, through the real model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.fuse import modes
from tests.cases.fuse_parts import Padded, Pretrained

TRUNK: dict[str, Any] = {
    "num_blocks": 2,
    "sequence_state_dim": 32,
    "pairwise_state_dim": 16,
    "sequence_head_width": 8,
    "pairwise_head_width": 8,
    "chunk_size": 7,
    "max_recycles": 1,  # recycling cuts distances into bins: one pass is as exact as its numbers
    "structure_module": {
        "sequence_dim": 16, "pairwise_dim": 8, "ipa_dim": 4, "resnet_dim": 8, "num_heads_ipa": 2,
        "num_qk_points": 2, "num_v_points": 2, "num_blocks": 1, "num_resnet_blocks": 1,
    },
}  # fmt: skip


class TestEsmFold(Padded, Pretrained):
    """The biases are maps of pairs: their weights are what others call tables."""

    tables = r"tri_att_(start|end)\.linear\.weight|pair_to_sequence\.linear\.weight"
    sharp = r"mha\.linear_q\.weight|seq_attention\.proj\.weight"
    dropout_names = ("dropout",)

    def build(self, **changes: Any) -> nn.Module:
        from transformers import EsmConfig, EsmForProteinFolding
        from transformers.models.esm.configuration_esm import get_default_vocab_list

        trunk = {**TRUNK, "dropout": 0.1, **changes}
        config = EsmConfig(
            vocab_size=33, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32, mask_token_id=32, pad_token_id=1, max_position_embeddings=300,
            position_embedding_type="rotary", is_folding_model=True,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            esmfold_config={"trunk": trunk, "fp16_esm": False, "lddt_head_hid_dim": 8},
            vocab_list=get_default_vocab_list(),
        )  # fmt: skip
        model = EsmForProteinFolding(config)
        with torch.no_grad():  # what a new model multiplies with zero must be seen
            for one in model.trunk.blocks.parameters():
                if one.ndim > 1 and not one.any():
                    one.normal_(std=one.shape[1] ** -0.5)
            model.eval()(**self.inputs(1, 3))  # it keeps tables of atoms from its first call on
        built: nn.Module = model
        return built

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, 20, (batch, length))}

    def output(self, found: Any) -> Tensor:
        return torch.cat([found.s_s, found.s_z.flatten(2)], -1)

    def test_padded_places_too(self) -> None:
        """Rows that see no key attend to all alike, as stock: its scores over all residues do."""
        model = self.model()
        given, _ = self.padded(self.length)
        with torch.no_grad(), modes.taking("fused"):
            wanted = model(**given)
            with ab.fuse(model, quiet=True, measure=False):
                found = model(**given)
        for name in ("s_s", "s_z", "positions", "plddt", "ptm_logits", "predicted_aligned_error"):
            assert self.off(getattr(found, name), getattr(wanted, name)) <= 3e-5, name

    @pytest.mark.parametrize("chunk", [None, 3])
    def test_chunks_do_not_matter(self, chunk: int | None) -> None:
        model: Any = self.model()
        model.trunk.set_chunk_size(chunk)
        given = self.inputs(1, self.length)
        wanted = self.run(model, given)
        with ab.fuse(model, quiet=True, measure=False):
            assert self.off(self.run(model, given), wanted) <= self.tolerance

    def test_nothing_is_left_to_stock_code(self) -> None:
        """Two blocks, each with two triangle attentions; the check found nothing to leave alone."""
        with ab.fuse(self.model(), quiet=True, measure=False) as fused:
            assert fused.replaced == 6
            assert not [one for one in fused.left if "trunk" in one.names[0]]

    def test_inputs_are_left_alone(self) -> None:
        """Pairs are changed in place, but never those that were given."""
        block: Any = self.model().trunk.blocks[0]  # type: ignore[union-attr,index]
        s, z = torch.randn(2, 30, 32), torch.randn(2, 30, 30, 16)
        before = z.clone()
        with ab.fuse(block, quiet=True, measure=False), torch.no_grad(), modes.taking("fused"):
            block(s, z)
        assert torch.equal(z, before)

    def test_parts_that_are_listened_to_run(self) -> None:
        """A hook on a part of a block is called once for each forward, as before."""
        model: Any = self.model()
        block = model.trunk.blocks[0]
        given, seen = self.inputs(1, 30), []
        wanted = self.run(model, given)
        for part in (block.tri_mul_in, block.tri_att_end, block.sequence_to_pair, block.mlp_pair):
            part.register_forward_hook(lambda part, _, out: seen.append((part, out.shape)))
        with ab.fuse(model, quiet=True, measure=False):
            seen.clear()
            assert self.off(self.run(model, given), wanted) <= self.tolerance
        assert len(seen) == 4
        assert all(shape == (1, 30, 30, 16) for _, shape in seen)

    def test_a_mask_of_its_own(self) -> None:
        """Triangle attention with a pair mask of any kind."""
        part: Any = self.model().trunk.blocks[1].tri_att_end  # type: ignore[union-attr,index]
        z, mask = torch.randn(2, 20, 20, 16), torch.rand(2, 20, 20).round().long()
        two = torch.ones(2, 20, 20).long()
        two[:, 3], two[1, 5] = 0, 0
        with torch.no_grad(), modes.taking("fused"):
            for given in (mask, two, None):
                wanted = part(z, mask=given)
                with ab.fuse(part, quiet=True, measure=False), modes.recording() as seen:
                    assert self.off(part(z, mask=given), wanted) <= 1e-5
                assert bool(seen) == (given is not mask)

    def test_memory_is_bounded(self) -> None:
        """No tensor of rows x heads x N x N, in eval and in training."""
        from torch.utils._python_dispatch import TorchDispatchMode

        class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
            most = 0

            def __torch_dispatch__(
                self, func: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                out = func(*args, **(kwargs or {}))
                for one in out if isinstance(out, (tuple, list)) else (out,):
                    if isinstance(one, Tensor):
                        self.most = max(self.most, one.untyped_storage().nbytes() // 4)
                return out

        block: Any = self.model().trunk.blocks[0]  # type: ignore[union-attr,index]
        n = 96
        s, z = torch.randn(1, n, 32), torch.randn(1, n, n, 16)
        most = {}
        for route in ("stock", "fused"):
            with ab.fuse(block, quiet=True, measure=False), modes.taking(route):
                with torch.no_grad(), Largest() as seen:  # type: ignore[no-untyped-call]
                    block(s, z)
                most[route] = seen.most
                with Largest() as seen:  # type: ignore[no-untyped-call]
                    sum(one.sum() for one in block(s, z)).backward()
                most[route + " training"] = seen.most
        rows = n * 2 * n * n  # the scores of all rows, two heads
        assert most["stock"] >= rows
        assert most["fused"] <= 4 * z.numel()  # the transition is four times as wide
        assert most["fused training"] < rows <= most["stock training"]
