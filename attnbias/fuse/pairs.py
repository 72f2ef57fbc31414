"""What models of residue pairs have in common: attention over the rows of a pair representation
and products of its triangles, by blocks of rows.

A pair representation ``z (batch, N, N, channels)`` is large and everything around its attention is
read and written from end to end; here it passes through a block of `TOKENS` pairs at a time, so
that beside results of its size only blocks are held, and those stay near the core.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.bias import Bias, Dense, KeyBias
from attnbias.fuse.family import Family, Size, compute
from attnbias.fuse.truncation import Truncation

TOKENS = 2**12  # pairs in a block: 2 MB in float32 with 128 channels; measured
MASKS = 4  # different rows of a pair mask; a model makes two, that of real residues and nothing

FACTORS = "_attnbias_factors"  # what a module carries whose bias is replaced by one of low rank

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Heads:
    """The projections of one gated attention: maps of ``(..., channels)``.

    query, key, value give ``(..., heads * size)``; gate what is multiplied with the output, after
    its sigmoid (None: no gate); out the way back.
    """

    count: int
    query: Map
    key: Map
    value: Map
    gate: Map | None
    out: Map
    scale: float

    def split(self, made: Tensor) -> Tensor:
        """``(batch, N, heads * size)`` as ``(batch, heads, N, size)``."""
        return made.view(*made.shape[:-1], self.count, -1).transpose(1, 2)

    def attend(self, x: Tensor, bias: Bias | None) -> Tensor:
        """Self-attention of ``x (batch, N, channels)``, gated and projected."""
        out = compute(
            self.split(self.query(x)),
            self.split(self.key(x)),
            self.split(self.value(x)),
            bias,
            scale=self.scale,
        ).flatten(2)
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.out(out)


def takes(module: nn.Module, z: Tensor, heads: int, rows: int) -> bool:
    """Whether a fused module takes the fused route for ``z (batch, N, N, channels)``.

    rows: how many rows attend, each to N keys.
    """
    family: Family = module._attnbias_fused.family  # type: ignore[union-attr,assignment]
    n, learning = z.shape[1], torch.is_grad_enabled()
    size = Size(z.shape[0] * rows, heads, n, n, learning, z.dtype, z.device)
    return n > 0 and family.takes(size)


def blocks(rows: int, width: int, tokens: int = TOKENS) -> Iterator[slice]:
    """Slices of about `tokens` pairs."""
    step = max(1, tokens // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def grouped(mask: Tensor | None) -> list[tuple[Tensor | None, Tensor | None]] | None:
    """Rows of a pair mask ``(N, N)`` that hide the same keys: ``(rows, keys that are seen)``.

    None stands for all rows, and for all keys. The result is None where there are too many kinds.
    """
    if mask is None or bool((mask == 1).all()):
        return [(None, None)]
    kinds, which = torch.unique(mask, dim=0, return_inverse=True)
    if kinds.shape[0] > MASKS:
        return None
    if kinds.shape[0] == 1:
        return [(None, kinds[0])]
    return [((which == number).nonzero()[:, 0], kind) for number, kind in enumerate(kinds)]


def pair_bias(z: Tensor, norm: Map, to_bias: Map, rows: slice | None = None) -> Tensor:
    """``(batch, heads, rows, N)``: a bias read from ``z (batch, N, N, channels)``, heads first."""
    wanted = range(z.shape[1])[slice(None) if rows is None else rows]
    out: Tensor | None = None
    for part in blocks(len(wanted), z.shape[0] * z.shape[2]):
        made = to_bias(norm(z[:, wanted.start + part.start : wanted.start + part.stop]))
        if out is None:
            out = made.new_empty(z.shape[0], made.shape[-1], len(wanted), z.shape[2])
        out[:, :, part] = made.permute(0, 3, 1, 2)
    assert out is not None
    return out


@dataclass(frozen=True)
class Triangle:
    """The parts of one triangle attention.

    Attributes:
        norm: of the pairs. to_bias: normed pairs to ``(..., heads)``. heads: the projections.
        ending: whether columns attend in place of rows.
        infinity: what hides a key, finite: a row that sees none attends as the stock code lets it.
        factors: what makes a bias of low rank in place of the pair bias: a `Truncation` of it, or
            networks of `pair_features`; None: the bias itself.
    """

    norm: Map
    to_bias: Map
    heads: Heads
    ending: bool
    infinity: float
    factors: nn.Module | None = None

    def bias(self, entries: Tensor, seen: Tensor | None) -> Bias:
        """The pair bias ``(1, heads, N, N)``, keys hidden."""
        if seen is None:
            return Dense(entries)
        kind = torch.promote_types(entries.dtype, torch.float32)
        return Dense(entries.to(kind) + self.infinity * (seen.to(kind) - 1))

    def low_rank(self, z: Tensor, seen: Tensor | None) -> Bias:
        """What stands for the bias of ``z (N, N, channels)``."""
        assert self.factors is not None
        if isinstance(self.factors, Truncation):
            entries = pair_bias(z[None], self.norm, self.to_bias)
            if seen is not None:
                entries = entries * seen[:, None] * seen
            found: Bias = self.factors(entries)
        else:
            features = pair_features(z, self.norm, seen)
            found = self.factors(features, features)
        return found if seen is None else found + KeyBias(self.infinity * (seen.float() - 1))


class TriangleFamily(Family):
    """A family of triangle attention modules: it says what their parts are."""

    form = "pair bias, one matrix for all rows"
    least = 80 * 80
    longest = 192  # a second or two

    @abstractmethod
    def triangle_of(self, module: Any) -> Triangle:
        """The parts of a module, with the factors it carries."""


def carried(module: nn.Module) -> nn.Module | None:
    """The factors that stand for the bias of a module while it is fused, if any."""
    found: nn.Module | None = vars(module).get(FACTORS)
    return found


def pair_features(z: Tensor, norm: Map, seen: Tensor | None = None) -> Tensor:
    """``(N, 3 channels)`` of ``z (N, N, channels)``: of each token the means of its row and column
    of normed pairs over the tokens that are seen, and its own pair.
    """
    weight = z.new_ones(z.shape[0]) if seen is None else seen.to(z.dtype)
    weight = weight / weight.sum().clamp(min=1)
    rows, own = [], []
    columns = z.new_zeros(z.shape[1:])
    for part in blocks(z.shape[0], z.shape[1]):
        x = norm(z[part])
        rows.append(torch.einsum("ijc,j->ic", x, weight))
        columns = columns + torch.einsum("ijc,i->jc", x, weight[part])
        numbers = torch.arange(part.start, part.stop, device=z.device)
        own.append(x[numbers - part.start, numbers])
    return torch.cat([torch.cat(rows), columns, torch.cat(own)], -1)


def triangle_attention(
    z: Tensor, parts: Triangle, mask: Tensor | None, into: Tensor | None = None
) -> Tensor | None:
    r"""Attention of every row of ``z`` (around the ending node: of every column) over itself.

    .. math:: \mathrm{softmax}_k(q_{ij} \cdot k_{ik} + b_{jk} + \infty (m_{ik} - 1))

    The bias ``b`` is one matrix per head for all rows, and never expanded.

    Args:
        z: ``(batch, N, N, channels)``. mask: ``(batch, N, N)`` of zeros and ones, or None.
        into: where the result is added, in place (may be `z` itself); without gradients only.

    Returns:
        `into`, or the result ``(batch, N, N, channels)``; None where the mask has rows of too many
        kinds.
    """
    if parts.ending:
        z = z.transpose(1, 2)
        mask = None if mask is None else mask.transpose(1, 2)
    kinds = []
    for b in range(z.shape[0]):
        kind = grouped(None if mask is None else mask[b])
        if kind is None:
            return None
        kinds.append(kind)
    if torch.is_grad_enabled():
        out = torch.stack([_learning(z[b], parts, kind) for b, kind in enumerate(kinds)])
        return out.transpose(1, 2) if parts.ending else out
    if into is None:
        target = torch.zeros(z.shape, dtype=z.dtype, device=z.device)
    else:
        target = into.transpose(1, 2) if parts.ending else into
    low, norm = parts.factors is not None, parts.norm
    for b, kind in enumerate(kinds):
        entries = None if low else pair_bias(z[b : b + 1], norm, parts.to_bias)
        made = [
            (parts.low_rank(z[b], seen) if entries is None else parts.bias(entries, seen), rows)
            for rows, seen in kind
        ]  # before the first row is changed
        for bias, rows in made:
            count = z.shape[1] if rows is None else len(rows)
            for part in blocks(count, z.shape[2], (16 if low else 1) * TOKENS):
                some = part if rows is None else rows[part]
                target[b, some] += parts.heads.attend(norm(z[b, some]), bias)
    return target.transpose(1, 2) if parts.ending else target


def _learning(
    z: Tensor, parts: Triangle, kinds: list[tuple[Tensor | None, Tensor | None]]
) -> Tensor:
    """One protein ``(N, N, channels)`` with gradients: all rows of a kind at once."""
    x = parts.norm(z)
    entries = parts.to_bias(x).permute(2, 0, 1)[None].contiguous()
    out: Tensor | None = None
    for rows, seen in kinds:
        made = parts.heads.attend(x if rows is None else x[rows], parts.bias(entries, seen))
        if rows is None:
            return made
        out = made.new_zeros(x.shape[0], *made.shape[1:]) if out is None else out
        out = out.index_copy(0, rows, made)
    assert out is not None
    return out


def row_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    z: Tensor,
    norm: Map,
    to_bias: Map,
    keep: Tensor | None,
    scale: float,
) -> Tensor:
    r"""Attention of tokens with a bias read from their pairs ``z (batch, N, N, channels)``.

    .. math:: \mathrm{softmax}_k(s\, q_j \cdot k_k + w_h \cdot \mathrm{LN}(z)_{jk})

    Without gradients the bias of a block of queries at a time is made: no tensor of N x N beside
    ``z``.

    Args:
        query, key, value: ``(batch, heads, N, size)``.
        keep: ``(batch, N)``, 0 or False where a key is hidden.

    Returns:
        ``(batch, N, heads * size)``.
    """
    hidden = None if keep is None or bool(keep.all()) else (keep == 0)[:, None, None]

    def part(rows: slice | None) -> Tensor:
        if rows is None:
            entries = to_bias(norm(z)).permute(0, 3, 1, 2).contiguous()
        else:
            entries = pair_bias(z, norm, to_bias, rows)
        if hidden is not None:
            entries = entries.masked_fill(hidden, -torch.inf)
        some = query if rows is None else query[:, :, rows]
        return compute(some, key, value, Dense(entries), scale=scale).flatten(2)

    if torch.is_grad_enabled():
        return part(None)
    return torch.cat([part(rows) for rows in blocks(z.shape[1], z.shape[2], 32 * TOKENS)], 1)
