"""What models of residue pairs have in common: attention over the rows of a pair representation
and products of its triangles, by blocks of rows.

A pair representation ``z (batch, N, N, channels)`` is large and everything around its attention is
read and written from end to end; here it passes through a block of `TOKENS` pairs at a time, so
that beside results of its size only blocks are held, and those stay near the core.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnbias.bias import Bias, Dense
from attnbias.fuse.family import Family, Size, compute

TOKENS = 2**14  # pairs in a block: 8 MB in float32 with 128 channels
MASKS = 4  # different rows of a pair mask; a model makes two, that of real residues and nothing

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


def triangle_attention(
    z: Tensor,
    norm: Map,
    to_bias: Map,
    heads: Heads,
    mask: Tensor | None,
    *,
    ending: bool,
    infinity: float,
    into: Tensor | None = None,
) -> Tensor | None:
    r"""Attention of every row of ``z`` (`ending`: of every column) over itself.

    .. math:: \mathrm{softmax}_k(q_{ij} \cdot k_{ik} + b_{jk} + \infty (m_{ik} - 1))

    The bias ``b`` is one matrix per head for all rows, and never expanded.

    Args:
        z: ``(batch, N, N, channels)``. mask: ``(batch, N, N)`` of zeros and ones, or None.
        infinity: what hides a key, finite: a row that sees none attends as the stock code lets it.
        into: where the result is added, in place (may be `z` itself); without gradients only.

    Returns:
        `into`, or the result ``(batch, N, N, channels)``; None where the mask has rows of too many
        kinds.
    """
    if ending:
        z = z.transpose(1, 2)
        mask = None if mask is None else mask.transpose(1, 2)
    kinds = [grouped(None if mask is None else mask[b]) for b in range(z.shape[0])]
    if any(one is None for one in kinds):
        return None
    learning = torch.is_grad_enabled()
    if learning:
        out = torch.stack(
            [
                _rows_learning(z[b], norm, to_bias, heads, kind or [], infinity)
                for b, kind in enumerate(kinds)
            ]
        )
        return out.transpose(1, 2) if ending else out
    if into is not None:
        target = into.transpose(1, 2) if ending else into
    else:
        target = torch.zeros_like(z)
    for b, kind in enumerate(kinds):
        entries = pair_bias(z[b : b + 1], norm, to_bias)
        for rows, seen in kind or []:
            bias = Dense(_hidden(entries, seen, infinity))
            count = z.shape[1] if rows is None else len(rows)
            for part in blocks(count, z.shape[2]):
                if rows is None:
                    target[b, part] += heads.attend(norm(z[b, part]), bias)
                else:
                    some = rows[part]
                    target[b, some] += heads.attend(norm(z[b, some]), bias)
    return target.transpose(1, 2) if ending else target


def _hidden(entries: Tensor, seen: Tensor | None, infinity: float) -> Tensor:
    if seen is None:
        return entries
    return entries.float() + infinity * (seen.float() - 1)


def _rows_learning(
    z: Tensor,
    norm: Map,
    to_bias: Map,
    heads: Heads,
    kinds: list[tuple[Tensor | None, Tensor | None]],
    infinity: float,
) -> Tensor:
    """One protein ``(N, N, channels)`` with gradients: all rows of a kind at once."""
    x = norm(z)
    entries = to_bias(x).permute(2, 0, 1)[None].contiguous()
    out: Tensor | None = None
    for rows, seen in kinds:
        bias = Dense(_hidden(entries, seen, infinity))
        made = heads.attend(x if rows is None else x[rows], bias)
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
    return torch.cat([part(rows) for rows in blocks(z.shape[1], z.shape[2], 8 * TOKENS)], 1)
