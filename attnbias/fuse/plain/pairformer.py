"""AlphaFold 3's Pairformer in plain PyTorch: the stock code that `fuse` is measured beside."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

INFINITY = 1e9


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class TriangleMultiplication(nn.Module):
    r"""Algorithms 12 and 13: an edge from the two other edges of its triangles.

    .. math:: g_{ij} \cdot W\,\mathrm{LN}\Big(\sum_k a_{ik} b_{jk}\Big), \qquad
              \text{incoming: } a_{ki} b_{kj}
    """

    def __init__(self, pair: int, hidden: int, *, incoming: bool) -> None:
        super().__init__()
        self.incoming = incoming
        self.norm, self.norm_out = nn.LayerNorm(pair), nn.LayerNorm(hidden)
        self.left, self.left_gate = _linear(pair, hidden), _linear(pair, hidden)
        self.right, self.right_gate = _linear(pair, hidden), _linear(pair, hidden)
        self.gate, self.out = _linear(pair, pair), _linear(hidden, pair)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """``(batch, N, N, pair)`` of the same; mask ``(batch, N, N)`` of zeros and ones."""
        z = self.norm(z)
        a = self.left_gate(z).sigmoid() * self.left(z)
        b = self.right_gate(z).sigmoid() * self.right(z)
        if mask is not None:
            a, b = a * mask[..., None], b * mask[..., None]
        a, b = (one.permute(0, 3, 1, 2) for one in (a, b))
        product = a.mT @ b if self.incoming else a @ b.mT
        out: Tensor = self.gate(z).sigmoid() * self.out(self.norm_out(product.permute(0, 2, 3, 1)))
        return out


class TriangleAttention(nn.Module):
    r"""Algorithms 14 and 15: attention of each row (`ending`: column) with one bias for all.

    .. math:: \mathrm{softmax}_k(q_{ij} \cdot k_{ik} / \sqrt{c} + b_{jk}), \qquad
              \text{ending: } q_{ij} \cdot k_{kj} / \sqrt{c} + b_{ki}
    """

    def __init__(self, pair: int, heads: int, size: int, *, ending: bool) -> None:
        super().__init__()
        self.heads, self.size, self.ending = heads, size, ending
        self.norm = nn.LayerNorm(pair)
        self.bias = _linear(pair, heads)
        self.query, self.key, self.value, self.gate = (
            _linear(pair, heads * size) for _ in range(4)
        )
        self.out = _linear(heads * size, pair)

    def forward(
        self, z: Tensor, mask: Tensor | None = None, chunk_size: int | None = None
    ) -> Tensor:
        """``(batch, N, N, pair)`` of the same; `chunk_size`: rows whose scores are made at once."""
        if self.ending:
            z = z.transpose(1, 2)
            mask = None if mask is None else mask.transpose(1, 2)
        z = self.norm(z)
        bias = self.bias(z).permute(0, 3, 1, 2)[:, None]
        rows = z.shape[1] if chunk_size is None else chunk_size
        parts = [
            self._rows(
                z[:, start : start + rows],
                bias,
                None if mask is None else mask[:, start : start + rows],
            )
            for start in range(0, z.shape[1], max(rows, 1))
        ]
        out = torch.cat(parts, 1)
        return out.transpose(1, 2) if self.ending else out

    def _rows(self, x: Tensor, bias: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            one(x).unflatten(-1, (self.heads, self.size)).transpose(-2, -3)
            for one in (self.query, self.key, self.value)
        )
        scores = query @ key.mT * self.size**-0.5 + bias
        if mask is not None:
            scores = scores + INFINITY * (mask[:, :, None, None, :] - 1)
        found = (scores.softmax(-1) @ value).transpose(-2, -3).flatten(-2)
        out: Tensor = self.out(found * self.gate(x).sigmoid())
        return out


class AttentionPairBias(nn.Module):
    r"""Algorithm 24 without conditioning: attention of the tokens with a bias of their pairs.

    .. math:: \mathrm{softmax}_k(q_j \cdot k_k / \sqrt{c} + w_h \cdot \mathrm{LN}(z_{jk}))
    """

    def __init__(self, single: int, pair: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, single // heads
        self.norm, self.norm_pair = nn.LayerNorm(single), nn.LayerNorm(pair)
        self.bias = _linear(pair, heads)
        self.query = nn.Linear(single, single)
        self.key, self.value, self.gate, self.out = (_linear(single, single) for _ in range(4))

    def forward(self, s: Tensor, z: Tensor, keep: Tensor | None = None) -> Tensor:
        """``(batch, N, single)`` of the same and pairs; keep ``(batch, N)``, 0 hides a token."""
        s = self.norm(s)
        query, key, value = (
            one(s).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
            for one in (self.query, self.key, self.value)
        )
        scores = query @ key.mT * self.size**-0.5
        scores = scores + self.bias(self.norm_pair(z)).permute(0, 3, 1, 2)
        if keep is not None:
            scores = scores.masked_fill(keep[:, None, None] == 0, -torch.inf)
        found = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        out: Tensor = self.out(self.gate(s).sigmoid() * found)
        return out


class Transition(nn.Module):
    r"""Algorithm 11: :math:`W_o(\mathrm{swish}(W_a x) \cdot W_b x)` of :math:`x = \mathrm{LN}`."""

    def __init__(self, size: int, factor: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.first, self.second = (_linear(size, factor * size) for _ in range(2))
        self.out = _linear(factor * size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        out: Tensor = self.out(F.silu(self.first(x)) * self.second(x))
        return out


class PairformerBlock(nn.Module):
    """One block of the Pairformer stack (algorithm 17), as AlphaFold 3 sizes it.

    Source: Abramson et al., "Accurate structure prediction of biomolecular interactions with
    AlphaFold 3", 2024 (no arXiv), supplementary algorithms 11 to 17 and 24. Departures: none known
    in the block; weights are drawn anew.

    Args:
        single, pair: channels of the tokens ``s (batch, N, single)`` and their pairs ``z (batch, N,
            N, pair)``.
        heads: of the tokens' attention. pair_heads, pair_size: of triangle attention.
        hidden: of triangle multiplication, by default `pair`.
        dropout: probability with which a row or column of an update of the pairs is dropped.
    """

    def __init__(
        self,
        single: int = 384,
        pair: int = 128,
        *,
        heads: int = 16,
        pair_heads: int = 4,
        pair_size: int = 32,
        hidden: int | None = None,
        dropout: float = 0.25,
    ) -> None:
        super().__init__()
        hidden = pair if hidden is None else hidden
        self.single, self.pair, self.dropout = single, pair, dropout
        self.product_out = TriangleMultiplication(pair, hidden, incoming=False)
        self.product_in = TriangleMultiplication(pair, hidden, incoming=True)
        self.attention_start = TriangleAttention(pair, pair_heads, pair_size, ending=False)
        self.attention_end = TriangleAttention(pair, pair_heads, pair_size, ending=True)
        self.pair_transition = Transition(pair)
        self.attention = AttentionPairBias(single, pair, heads)
        self.single_transition = Transition(single)

    def forward(
        self,
        s: Tensor,
        z: Tensor,
        mask: Tensor | None = None,
        chunk_size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """New ``(s, z)``.

        Args:
            s: ``(batch, N, single)``. z: ``(batch, N, N, pair)``.
            mask: ``(batch, N)`` of zeros and ones, 1 for a real token.
            chunk_size: rows of triangle attention whose scores are made at once; None: all.
        """
        pairs = None if mask is None else mask[:, :, None] * mask[:, None, :]
        z = self.pairs(z, pairs, chunk_size)
        s = s + self.attention(s, z, mask)
        return s + self.single_transition(s), z

    def pairs(self, z: Tensor, mask: Tensor | None, chunk_size: int | None) -> Tensor:
        """The pairs' side of the block; mask ``(batch, N, N)``."""
        z = z + self._dropped(self.product_out(z, mask), 1)
        z = z + self._dropped(self.product_in(z, mask), 1)
        z = z + self._dropped(self.attention_start(z, mask, chunk_size), 1)
        z = z + self._dropped(self.attention_end(z, mask, chunk_size), 2)
        out: Tensor = z + self.pair_transition(z)
        return out

    def _dropped(self, update: Tensor, shared: int) -> Tensor:
        """Dropout whose pattern is one for all of dimension `shared`."""
        if not self.training or not self.dropout:
            return update
        shape = list(update.shape)
        shape[shared] = 1
        return update * F.dropout(update.new_ones(shape), self.dropout)


class Pairformer(nn.Module):
    """A stack of `blocks` blocks; arguments as in `PairformerBlock`."""

    def __init__(self, blocks: int = 48, single: int = 384, pair: int = 128, **more: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PairformerBlock(single, pair, **more)  # type: ignore[arg-type]
            for _ in range(blocks)
        )

    def forward(
        self, s: Tensor, z: Tensor, mask: Tensor | None = None, chunk_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `PairformerBlock`."""
        for block in self.blocks:
            s, z = block(s, z, mask, chunk_size)
        return s, z
