"""What a block of residue pairs does beside its attention, without gradients and by blocks of rows.

Products of triangles, transitions, and what tokens add to their pairs: the same numbers as the
stock code, in place, with no more than two tensors of the size of ``z`` beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.fuse.pairs import Map, blocks

PRODUCT = 2**17  # entries of each channel that are summed at once: 64 MB with 128 channels


def stands(child: nn.Module, kind: Any) -> bool:
    """Whether a part of a block computes what its class does and nobody listens to it."""
    hooked = child._forward_hooks or child._forward_pre_hooks
    replaced = "forward" in vars(child) and "_attnbias_fused" not in vars(child)
    return type(child).forward is kind.forward and not hooked and not replaced


@dataclass(frozen=True)
class Product:
    """The parts of a product over triangles.

    Attributes:
        norm: of the pairs. sides: (value, gate) of a and of b, maps of normed pairs; a side is the
            value times the sigmoid of the gate.
        after: of the sum over k. gate: of normed pairs, what the update is multiplied with.
        incoming: whether the sum runs over the first index of both sides.
    """

    norm: Map
    sides: tuple[tuple[nn.Module, nn.Module], tuple[nn.Module, nn.Module]]
    after: Map
    gate: Map
    incoming: bool


def channels_first(part: nn.Module, x: Tensor) -> Tensor:
    """``part(x).mT`` for ``x (pairs, channels)``, written in that order by the product itself."""
    if isinstance(part, nn.Linear) and stands(part, nn.Linear):
        if part.bias is None:
            return part.weight @ x.mT
        return torch.addmm(part.bias[:, None], part.weight, x.mT)
    made: Tensor = part(x)
    return made.mT


def triangle_product(z: Tensor, parts: Product, mask: Tensor | None) -> None:
    r"""Add the product over triangles of a pair representation to it, in place.

    .. math:: z_{ij} \mathrel{+}= g_{ij} \cdot W\,\mathrm{LN}\Big(\sum_k a_{ik} b_{jk}\Big)

    (incoming: :math:`a_{ki} b_{kj}`). Beside ``z`` there are ``a`` and ``b``, channels first, as
    the product over k wants them.

    Args:
        z: ``(batch, N, N, channels)``.
        mask: ``(batch, N, N)``, what a and b are multiplied with, or None.
    """
    n = z.shape[1]
    hidden = parts.sides[0][0](parts.norm(z[:1, 0, :1])).shape[-1]
    made = z.new_empty(2, hidden, n * n)
    rows = max(1, min(n, PRODUCT // n))
    space = z.new_empty(hidden, rows, n)
    for b in range(z.shape[0]):
        source, seen = z[b], None if mask is None else mask[b].to(z.dtype)
        if parts.incoming:
            source = source.transpose(0, 1)
            seen = None if seen is None else seen.transpose(0, 1)
        for part in blocks(n, n):
            x = parts.norm(source[part]).flatten(0, 1)
            place = slice(part.start * n, part.stop * n)
            for out, (value, gate) in zip(made, parts.sides, strict=True):
                side = channels_first(gate, x).sigmoid_()
                torch.mul(side, channels_first(value, x), out=out[:, place])
                if seen is not None:
                    out[:, place] *= seen[part].reshape(1, -1)
        first, second = made.view(2, hidden, n, n)
        for some in blocks(n, 1, rows):
            summed = torch.bmm(first[:, some], second.mT, out=space[:, : some.stop - some.start])
            for part in blocks(summed.shape[1], n):
                old = z[b, some.start + part.start : some.start + part.stop]
                update = parts.after(summed[:, part].permute(1, 2, 0))
                old += update * parts.gate(parts.norm(old))


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
