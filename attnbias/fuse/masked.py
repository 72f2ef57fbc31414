"""Attention of many short problems under a few masks, with gradients to the masks.

The fused operator gives no gradient to a mask, so PyTorch's own code keeps the weights of all
windows for the backward pass. Here they are made again, as many windows at a time as fit a cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbias.lowering import flash, plain

# Entries of the masks of all windows, up to which one call is faster than one a kind: 1 MB.
TOGETHER = 2**18
# Scores that the backward pass makes at once: 1 MB in float32.
SCORES = 2**18

Kinds = tuple[tuple[int, slice], ...]


def forward(
    query: Tensor, key: Tensor, value: Tensor, masks: Tensor, kinds: Kinds, scale: float
) -> tuple[Tensor, Tensor]:
    """Output ``(batch, heads, n, size)`` and log-sum-exp, without gradients.

    Args:
        query, key, value: ``(batch, heads, n, size)``. masks: ``(kinds, heads, n, n)``.
        kinds: numbers of masks with the slices of the batch that they belong to, in order.
    """
    batch, heads, count, _ = query.shape
    if len(kinds) > 1 and batch * heads * count**2 <= TOGETHER:
        which = [kind for kind, part in kinds for _ in range(part.start, part.stop)]
        return flash.call(query, key, value, masks[which], False, scale)
    found = []
    for kind, part in kinds:
        mask = masks[kind].expand(part.stop - part.start, -1, -1, -1)
        found.append(flash.call(query[part], key[part], value[part], mask, False, scale))
    if len(found) == 1:
        return found[0]
    # Heads of a token are neighbours in what the operator gives.
    out = torch.cat([one.transpose(1, 2) for one, _ in found]).transpose(1, 2)
    return out, torch.cat([one for _, one in found])


class Masked(torch.autograd.Function):
    """`forward` with gradients; ``Masked.apply(query, key, value, masks, kinds, scale)``."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        masks: Tensor,
        kinds: Kinds,
        scale: float,
    ) -> Tensor:
        out, lse = forward(query, key, value, masks, kinds, scale)
        ctx.save_for_backward(query, key, value, masks, out, lse)
        ctx.kinds, ctx.scale = kinds, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, masks, out, lse = ctx.saved_tensors
        kind, (_, heads, count, _) = plain.working(query.dtype), query.shape
        made = [
            torch.empty_like(one.transpose(1, 2)).transpose(1, 2) for one in (query, key, value)
        ]
        summed = torch.zeros_like(masks) if ctx.needs_input_grad[3] else None
        step = max(1, SCORES // (heads * count**2))
        room = torch.empty(2, step, heads, count, count, dtype=kind, device=query.device)
        with torch.autocast(query.device.type, enabled=False):
            for number, whole in ctx.kinds:
                for start in range(whole.start, whole.stop, step):
                    part = slice(start, min(start + step, whole.stop))
                    q, k, v, g = (one[part].to(kind) for one in (query, key, value, grad))
                    delta = (g * out[part].to(kind)).sum(-1, keepdim=True)
                    q, k, v, g = (one.reshape(-1, count, one.shape[-1]) for one in (q, k, v, g))
                    weights, steps = room[:, : part.stop - part.start]
                    weights.copy_(masks[number].expand_as(weights))
                    flat, moved = weights.view(-1, count, count), steps.view(-1, count, count)
                    flat.baddbmm_(q, k.mT, alpha=ctx.scale)
                    weights.sub_(lse[part, :, :, None]).exp_()
                    torch.bmm(g, v.mT, out=moved)
                    _put(made[2], part, torch.bmm(flat.mT, g))
                    steps.sub_(delta).mul_(weights)
                    _put(made[0], part, torch.bmm(moved, k).mul_(ctx.scale))
                    _put(made[1], part, torch.bmm(moved.mT, q).mul_(ctx.scale))
                    if summed is not None:
                        summed[number] += steps.sum(0)
        return *made, summed, None, None


def _put(whole: Tensor, part: slice, found: Tensor) -> None:
    whole[part] = found.view(whole[part].shape)
