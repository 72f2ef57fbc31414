"""What a block of residue pairs does beside its attention, without gradients and by blocks of rows.

Products of triangles, transitions, and what tokens add to their pairs: the same numbers as the
stock code, in place, with no more than two tensors of the size of ``z`` beside it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbias.fuse.pairs import TOKENS, Map, blocks


def stands(child: nn.Module, kind: Any) -> bool:
    """Whether a part of a block computes what its class does and nobody listens to it."""
    hooked = child._forward_hooks or child._forward_pre_hooks
    replaced = "forward" in vars(child) and "_attnbias_fused" not in vars(child)
    return type(child).forward is kind.forward and not hooked and not replaced


def _channels_first(z: Tensor, norm: Map, side: Map, mask: Tensor | None, out: Tensor) -> None:
    """``out (hidden, rows, N)`` of ``z (rows, N, channels)``."""
    for part in blocks(z.shape[0], z.shape[1]):
        made = side(norm(z[part]))
        if mask is not None:
            made = made * mask[part, :, None]
        out[:, part] = made.permute(2, 0, 1)


def triangle_product(
    z: Tensor,
    norm: Map,
    left: Map,
    right: Map,
    after: Map,
    gate: Map,
    mask: Tensor | None,
    *,
    incoming: bool,
) -> None:
    r"""Add the product over triangles of a pair representation to it, in place.

    .. math:: z_{ij} \mathrel{+}= g_{ij} \cdot W\,\mathrm{LN}\Big(\sum_k a_{ik} b_{jk}\Big)

    (`incoming`: :math:`a_{ki} b_{kj}`).

    Args:
        z: ``(batch, N, N, channels)``.
        left, right: a and b of normed pairs. after: of the sum over k. gate: of normed pairs.
        mask: ``(batch, N, N)``, what a and b are multiplied with, or None.
    """
    n = z.shape[1]
    hidden = right(norm(z[:1, :1, :1])).shape[-1]
    step = max(1, min(n, 8 * TOKENS // max(n, 1)))
    for b in range(z.shape[0]):
        source = z[b].transpose(0, 1) if incoming else z[b]
        seen = None if mask is None else mask[b]
        if seen is not None and incoming:
            seen = seen.transpose(0, 1)
        second = z.new_empty(hidden, n, n)
        _channels_first(source, norm, right, seen, second)
        # Outgoing, row i is made of row i and of `second`, so what was changed is not read again.
        first = z.new_empty(hidden, n if incoming else step, n)
        if incoming:
            _channels_first(source, norm, left, seen, first)
        for rows in blocks(n, 1, step):
            count = rows.stop - rows.start
            if incoming:
                some = first[:, rows]
            else:
                some = first[:, :count]
                _channels_first(
                    source[rows], norm, left, None if seen is None else seen[rows], some
                )
            made = torch.bmm(some, second.mT)
            for part in blocks(count, n):
                place = z[b, rows.start + part.start : rows.start + part.stop]
                update = after(made[:, part].permute(1, 2, 0))
                place += update * gate(norm(place))


def transition(z: Tensor, change: Map) -> None:
    """``z = change(z)``, pair by pair, in place."""
    for b in range(z.shape[0]):
        for rows in blocks(z.shape[1], z.shape[2]):
            z[b, rows] = change(z[b, rows])


def with_outer(z: Tensor, query: Tensor, key: Tensor, project: Map) -> Tensor:
    r"""A new tensor: ``z_{ij} + W [q_j k_i, q_j - k_i]``, for ``query, key (batch, N, width)``."""
    out = torch.empty_like(z)
    for b in range(z.shape[0]):
        q = query[b, None]
        for rows in blocks(z.shape[1], z.shape[2]):
            k = key[b, rows, None]
            out[b, rows] = z[b, rows] + project(torch.cat([q * k, q - k], -1))
    return out
