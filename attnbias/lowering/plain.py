"""Attention of one tile in plain PyTorch: the fallback of the fused operator, and gradients to a
bias.
"""

from __future__ import annotations

import torch
from torch import Tensor


def working(dtype: torch.dtype) -> torch.dtype:
    """Half formats are accumulated in float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads repeated to the number of query heads: query head ``h`` reads ``h //
    group``.
    """
    return (
        tensor
        if tensor.shape[1] == heads
        else tensor.repeat_interleave(heads // tensor.shape[1], 1)
    )


def sum_groups(grad: Tensor, heads: int) -> Tensor:
    """The adjoint of `repeat_heads`."""
    if grad.shape[1] == heads:
        return grad
    batch, all_heads, *rest = grad.shape
    return grad.reshape(batch, heads, all_heads // heads, *rest).sum(2)


def scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    kind = working(query.dtype)
    key = repeat_heads(key, query.shape[1]).to(kind)
    out = (query.to(kind) * scale) @ key.mT
    return out if mask is None else out + mask.to(kind)


def forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; a row without a visible key gives 0 and minus infinity."""
    score = scores(query, key, mask, scale)
    lse = score.logsumexp(-1)
    weight = (score - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = weight @ repeat_heads(value, query.shape[1]).to(weight.dtype)
    return out.to(query.dtype), lse


def backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to query, key, value and to the scores of one tile.

    ``dS = P (dO V^T - delta)`` with ``delta = rowsum(dO * O) - dLSE``: the gradient of the
    log-sum-exp with respect to the scores is P itself. Results in the working dtype.
    """
    heads = query.shape[1]
    kind = working(query.dtype)
    score = scores(query, key, mask, scale)
    weight = (score - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    grad_out = grad_out.to(kind)
    rep_value = repeat_heads(value, heads).to(kind)
    grad_score = weight * (grad_out @ rep_value.mT - delta[..., None])
    grad_query = (grad_score @ repeat_heads(key, heads).to(kind)) * scale
    grad_key = sum_groups(grad_score.mT @ (query.to(kind) * scale), key.shape[1])
    grad_value = sum_groups(weight.mT @ grad_out, value.shape[1])
    return grad_query, grad_key, grad_value, grad_score
