"""The only caller of PyTorch's fused attention operators, and the contract that makes them safe.

The operator of the CPU build is fast and has sharp edges (each is probed or tested): a zero length
ends the process, a row with no visible key reports a log-sum-exp of 0, the log-sum-exp carries no
gradient and comes back with odd strides, head sizes of keys and values must agree. `flash` has
none of these edges. Those of GPUs have others: `flash_gpu`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from attnbias.lowering import flash_gpu, plain
from attnbias.lowering.flash_tiles import without_a_key

# Rows of the plain fallback's tiles: small enough that a tile of 8 heads and 4,096 keys is 32 MB.
_FALLBACK_ROWS = 256


@functools.cache
def kernel() -> bool:
    """Whether this PyTorch has the fused CPU operator with the behaviour that `flash` relies on.

    Runs the operator once on a few numbers: masks in float32, grouped key heads, the two outputs.
    """
    try:
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        gen = torch.Generator().manual_seed(0)
        q, k = (torch.randn(1, h, 3, 8, generator=gen) for h in (2, 1))
        mask = torch.randn(3, generator=gen).expand(1, 2, 3, 3)
        with torch.no_grad():
            for kind, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
                a, b = q.to(kind), k.to(kind)
                out, lse = op(a, b, b, 0.0, False, attn_mask=mask, scale=0.5)
                want, want_lse = plain.forward(a, b, b, mask, 0.5)
                if (out - want).abs().max() > limit or (lse - want_lse).abs().max() > limit:
                    return False
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


def _fused(query: Tensor) -> bool:
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and query.dtype in kinds and kernel()


def call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator itself, without gradient: equal head sizes, no zero length (callers see to
    both).

    `mask` is float32 or float64, already expanded to ``(batch, heads, queries, keys)``. Rows
    without a visible key: output 0, log-sum-exp as the operator says (0).
    """
    if _fused(query):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=_fitting(mask, query), scale=scale
        )
        return out, lse.contiguous()
    if flash_gpu.takes(query):
        return flash_gpu.call(query, key, value, _fitting(mask, query), causal, scale)
    outs, lses = [], []
    for rows, tile in _fallback_tiles(query, key, mask, causal):
        out, lse = plain.forward(query[:, :, rows], key, value, tile, scale)
        outs.append(out)
        lses.append(lse.masked_fill(lse == -torch.inf, 0.0))
    return torch.cat(outs, 2), torch.cat(lses, 2)


def call_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value; `lse` is what `call` returned (0 in rows without a
    key).
    """
    if _fused(query):
        grads: tuple[Tensor, Tensor, Tensor]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad,
            query,
            key,
            value,
            out,
            lse,
            0.0,
            causal,
            attn_mask=_fitting(mask, query),
            scale=scale,
        )
        return grads
    if flash_gpu.takes(query):
        masked = _fitting(mask, query)
        return flash_gpu.call_backward(grad, query, key, value, out, lse, masked, causal, scale)
    kind = plain.working(query.dtype)
    delta = (grad.to(kind) * out.to(kind)).sum(-1)
    grad_key = torch.zeros(key.shape, dtype=kind, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=kind, device=key.device)
    grad_query = []
    for rows, tile in _fallback_tiles(query, key, mask, causal):
        dq, dk, dv, _ = plain.backward(
            query[:, :, rows],
            key,
            value,
            tile,
            scale,
            lse[:, :, rows],
            delta[:, :, rows],
            grad[:, :, rows],
        )
        grad_query.append(dq.to(query.dtype))
        grad_key += dk
        grad_value += dv
    return torch.cat(grad_query, 2), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _fitting(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A mask in the working dtype of the query.

    The operator takes float32 masks with half queries; next to float64 queries it takes them too,
    but reads a strided one wrongly.
    """
    kind = plain.working(query.dtype)
    return mask if mask is None or mask.dtype == kind else mask.to(kind)


def _fallback_tiles(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool
) -> list[tuple[slice, Tensor | None]]:
    tiles: list[tuple[slice, Tensor | None]] = []
    for start in range(0, query.shape[2], _FALLBACK_ROWS):
        rows = slice(start, min(start + _FALLBACK_ROWS, query.shape[2]))
        tile = None if mask is None else mask[:, :, rows]
        if causal:
            i = torch.arange(rows.start, rows.stop, device=query.device)[:, None]
            late = torch.arange(key.shape[2], device=query.device)[None, :] > i
            below = torch.zeros(late.shape, device=query.device).masked_fill_(late, -torch.inf)
            tile = below if tile is None else tile + below
        tiles.append((rows, tile))
    return tiles


def hide_empty(lse: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """The log-sum-exp with minus infinity in every row that sees no key. `lse` may be changed in
    place.

    Only rows where the operator said exactly 0 can be empty, so the mask is read for those alone.
    """
    if mask is None or mask.shape[-1] == 0:
        return lse
    suspects = lse == 0
    if lse.device.type == "cuda":  # to look at a value would be to wait for the device
        return lse.masked_fill_(suspects & without_a_key(mask, causal), -torch.inf)
    if not bool(suspects.any()):
        return lse
    if mask.stride(-2) == 0 or mask.shape[-2] == 1:  # one row of keys for all queries
        hidden = mask[:, :, 0] == -torch.inf
        if causal:
            first = (~hidden).int().argmax(-1, keepdim=True)  # 0 where all are hidden
            rows = torch.arange(lse.shape[-1], device=lse.device)
            empty = (rows < first) | hidden.all(-1, keepdim=True)
        else:
            empty = hidden.all(-1, keepdim=True)
        return lse.masked_fill_(suspects & empty, -torch.inf)
    where = suspects.nonzero()
    for part in torch.split(where, 256):
        b, h, i = part.unbind(1)
        seen = mask[b, h, i] > -torch.inf
        if causal:
            seen &= torch.arange(mask.shape[-1], device=lse.device) <= i[:, None]
        gone = part[~seen.any(-1)]
        lse[gone[:, 0], gone[:, 1], gone[:, 2]] = -torch.inf
    return lse


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, raw = call(query, key, value, mask, causal, scale)
        # The backward of the operator needs its own value in empty rows; the caller must see the
        # truth.
        lse = hide_empty(raw.clone(), mask, causal)
        ctx.save_for_backward(query, key, value, out, raw)
        ctx.mask, ctx.causal, ctx.scale = mask, causal, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        grad, query, key, value, out, size = with_lse_gradient(
            grad, grad_lse, lse, query, key, value, out
        )
        dq, dk, dv = call_backward(
            grad, query, key, value, out, lse, ctx.mask, ctx.causal, ctx.scale
        )
        return dq[..., :size], dk[..., :size], dv[..., :size], None, None, None


def with_lse_gradient(
    grad: Tensor | None,
    grad_lse: Tensor | None,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """Arguments of the operator's backward that also carry the gradient of the log-sum-exp,
    exactly.

    The operator subtracts ``rowsum(dO * O)`` from the gradient of the scores. One more column with
    ``dO = 1`` and ``O = -dLSE``, where query, key and value are 0, makes that
    ``rowsum(dO * O) - dLSE``.
    """
    size = query.shape[-1]
    if grad is None:
        grad = torch.zeros_like(out)
    if grad_lse is None:
        return grad, query, key, value, out, size
    query, key, value = (F.pad(t, (0, 1)) for t in (query, key, value))
    # An empty row has no score to give a gradient to.
    step = grad_lse.masked_fill(lse == -torch.inf, 0.0).to(out.dtype)
    grad = torch.cat([grad, torch.ones_like(step)[..., None]], -1)
    out = torch.cat([out, -step[..., None]], -1)
    return grad, query, key, value, out, size


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Fused attention with its log-sum-exp, both differentiable in query, key and value.

    Args:
        query: ``(batch, heads, queries, size)``. key, value: ``(batch, key heads, keys, size |
            value size)``.
        mask: float32 (float64), broadcastable to ``(batch, heads, queries, keys)``; strides of 0
            cost nothing. Gets no gradient.
        causal: query i sees keys up to i, counted from the START; combines with `mask`.
        scale: factor of the scores.

    Returns:
        ``(output, lse)``: output in the dtype of the query, lse in float32 (float64), contiguous.
        A row with no visible key gives 0 and minus infinity. Any length may be zero.
    """
    if query.numel() == 0 or key.shape[2] == 0 or value.shape[-1] == 0:
        return _nothing(query, key, value)
    if mask is not None:
        # The dtype first: a conversion would write out what is expanded.
        mask = mask.detach().to(plain.working(query.dtype))
        mask = mask.expand(*query.shape[:3], key.shape[2])
        if mask.shape[-1] > 1 and mask.stride(-1) != 1:
            mask = mask.contiguous()
    query, key, value, wide = equal_sizes(query, key, value)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    apply: Any = _Flash.apply
    out, lse = apply(query, key, value, mask, causal, scale)
    return out[..., :wide], lse


def equal_sizes(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Zero columns until keys and values have one head size: without them the fused path is
    lost.
    """
    size, wide = query.shape[-1], value.shape[-1]
    if wide < size:
        value = F.pad(value, (0, size - wide))
    elif wide > size:
        query, key = (F.pad(t, (0, wide - size)) for t in (query, key))
    return query, key, value, wide


def _nothing(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with a zero length somewhere: zeros that still belong to the graph."""
    batch, heads, rows = query.shape[:3]
    tie = sum((t.flatten()[:0].sum() for t in (query, key, value)), query.new_zeros(()))
    out = query.new_zeros(batch, heads, rows, value.shape[-1]) + tie
    lse = torch.full(
        (batch, heads, rows), -torch.inf, dtype=plain.working(query.dtype), device=query.device
    )
    return out, lse
