"""A Pairformer in plain PyTorch, fused beside itself, and beside the equations written out."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.fuse import learn, modes
from attnbias.fuse.plain.pairformer import Pairformer, PairformerBlock
from tests.cases.fuse_parts import Padded, Trained


class Model(nn.Module):
    """Tokens and pairs of small numbers, and two blocks."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.single, self.pair = nn.Embedding(20, 32), nn.Embedding(41, 16)
        self.trunk = Pairformer(2, 32, 16, heads=4, pair_heads=2, pair_size=8, dropout=dropout)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        n = input_ids.shape[1]
        far = (torch.arange(n) - torch.arange(n)[:, None]).clamp(-10, 10) + 10
        z = self.pair(far + input_ids[:, :, None]) + self.pair(input_ids)[:, None]
        s, z = self.trunk(self.single(input_ids), z, attention_mask)
        return torch.cat([s, z.flatten(2)], -1)


class TestPairformer(Padded, Trained):
    tables = r"\.bias\.weight"
    sharp = r"query\.weight"
    dropout_names = ("dropout",)

    def build(self, **changes: Any) -> nn.Module:
        return Model(**{"dropout": 0.25, **changes})

    def inputs(self, batch: int, length: int) -> dict[str, Tensor]:
        return {"input_ids": torch.randint(0, 20, (batch, length))}

    def output(self, found: Any) -> Tensor:
        assert isinstance(found, Tensor)
        return found

    def test_padded_places_too(self) -> None:
        model = self.model()
        given, _ = self.padded(self.length)
        wanted = self.run(model, given)
        with ab.fuse(model, quiet=True, measure=False):
            assert self.off(self.run(model, given), wanted) <= self.tolerance

    def test_nothing_is_left_to_stock_code(self) -> None:
        """Two blocks, each with two triangle attentions; the check found nothing to leave alone."""
        with ab.fuse(self.model(), quiet=True, measure=False) as fused:
            assert fused.replaced == 6
            assert not [one for one in fused.left if "trunk" in one.names[0]]

    def test_low_rank_reaches_the_exact_output(self) -> None:
        """The whole model with pair biases of a lower rank: off by less with more, then by none."""
        model = self.model()
        given = self.inputs(1, 30)
        wanted = self.run(model, given)
        off = []
        for rank in (1, 8, 30):
            found = learn(model, [given], rank=rank, quiet=True)
            with ab.fuse(model, quiet=True, measure=False, factors=found):
                off.append(self.off(self.run(model, given), wanted))
        assert off[0] > off[1] > 1e-4
        assert off[2] <= self.tolerance

    def test_float64(self) -> None:
        model = self.model().double()
        given, real = self.padded(self.length)
        pairs = torch.cat([torch.ones(32), real[1].repeat_interleave(16)]).bool()
        wanted = self.run(model, given)[real][:, pairs]
        with ab.fuse(model, quiet=True, measure=False):
            found = self.run(model, given)[real][:, pairs]
        assert self.off(found, wanted) <= 1e-12

    def test_autocast(self) -> None:
        model = self.model()
        given = self.inputs(2, self.length)
        exact = self.run(model, given)
        with torch.autocast("cpu", torch.bfloat16):
            stock = self.off(self.run(model, given).float(), exact)
            with ab.fuse(model, quiet=True, measure=False):
                found = self.off(self.run(model, given).float(), exact)
        assert 0 < found <= 1.5 * stock + 1e-3

    def test_inputs_are_left_alone(self) -> None:
        block: Any = self.model().trunk.blocks[0]  # type: ignore[union-attr,index]
        s, z = torch.randn(2, 30, 32), torch.randn(2, 30, 30, 16)
        before = z.clone()
        with ab.fuse(block, quiet=True, measure=False), torch.no_grad(), modes.taking("fused"):
            block(s, z)
        assert torch.equal(z, before)


def test_the_block_is_that_of_the_paper() -> None:
    """Algorithms 11 to 17 and 24, one number after the other, in float64."""
    torch.manual_seed(0)
    block: Any = PairformerBlock(12, 6, heads=2, pair_heads=2, pair_size=3, hidden=5).double()
    block.eval()
    with torch.no_grad():
        for one in block.parameters():
            one.normal_(std=0.5)
        s, z = torch.randn(1, 4, 12).double(), torch.randn(1, 4, 4, 6).double()
        found_s, found_z = block(s, z)
        wanted_s, wanted_z = _written_out(block, s[0], z[0])
    assert torch.allclose(found_s[0], wanted_s, atol=1e-10)
    assert torch.allclose(found_z[0], wanted_z, atol=1e-10)


def _written_out(block: Any, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    n = range(z.shape[0])
    for part in (block.product_out, block.product_in):
        x = part.norm(z)
        a = torch.sigmoid(x @ part.left_gate.weight.T) * (x @ part.left.weight.T)
        b = torch.sigmoid(x @ part.right_gate.weight.T) * (x @ part.right.weight.T)
        new = z.clone()
        for i in n:
            for j in n:
                total = sum(a[k, i] * b[k, j] if part.incoming else a[i, k] * b[j, k] for k in n)
                gate = torch.sigmoid(part.gate.weight @ x[i, j])
                new[i, j] += gate * (part.out.weight @ part.norm_out(total))
        z = new
    for part in (block.attention_start, block.attention_end):
        x = part.norm(z)
        new = z.clone()
        for i in n:
            for j in n:
                heads = []
                for h in range(part.heads):
                    cut = slice(3 * h, 3 * h + 3)
                    q = part.query.weight[cut] @ x[i, j]
                    places = [(k, j) if part.ending else (i, k) for k in n]
                    biases = [(k, i) if part.ending else (j, k) for k in n]
                    logits = torch.stack(
                        [
                            q @ (part.key.weight[cut] @ x[place]) / math.sqrt(3)
                            + part.bias.weight[h] @ x[other]
                            for place, other in zip(places, biases, strict=True)
                        ]
                    )
                    values = torch.stack([part.value.weight[cut] @ x[place] for place in places])
                    heads.append(logits.softmax(0) @ values)
                gate = torch.sigmoid(part.gate.weight @ x[i, j])
                new[i, j] += part.out.weight @ (gate * torch.cat(heads))
        z = new
    z = z + _transition(block.pair_transition, z)
    part, x, pairs = block.attention, block.attention.norm(s), block.attention.norm_pair(z)
    rows = []
    for i in n:
        heads = []
        for h in range(part.heads):
            cut = slice(6 * h, 6 * h + 6)
            q = part.query.weight[cut] @ x[i] + part.query.bias[cut]
            logits = torch.stack(
                [
                    q @ (part.key.weight[cut] @ x[k]) / math.sqrt(6)
                    + part.bias.weight[h] @ pairs[i, k]
                    for k in n
                ]
            )
            values = torch.stack([part.value.weight[cut] @ x[k] for k in n])
            heads.append(logits.softmax(0) @ values)
        gate = torch.sigmoid(part.gate.weight @ x[i])
        rows.append(part.out.weight @ (gate * torch.cat(heads)))
    s = s + torch.stack(rows)
    return s + _transition(block.single_transition, s), z


def _transition(part: Any, x: Tensor) -> Tensor:
    x = part.norm(x)
    a, b = x @ part.first.weight.T, x @ part.second.weight.T
    out: Tensor = (a * torch.sigmoid(a) * b) @ part.out.weight.T
    return out
