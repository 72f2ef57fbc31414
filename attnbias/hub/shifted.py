"""The model's own operator under one more number per key: what the numbers leave alone keeps its
bits.

A mask of zeros changes no bit of the CPU operator's output (the product with the scale is rounded
once either way), and each head and row is computed by itself. So one call with a row of mask
serves rows and heads that an edit changes and those that it leaves to the model.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.errors import Refused
from attnbias.hub.stock import is_shared, split_bias
from attnbias.lowering import flash

if TYPE_CHECKING:
    from attnbias.hub.call import Call


def shifted(
    call: Call, weight: Tensor | None, query: Tensor | None = None, *, every: bool = False
) -> Tensor | None:
    """The stock output with `weight` added to the scores, or None where it cannot be had so.

    Rows of heads that see no key with a weight are the stock output bit for bit.

    Args:
        weight: ``(batch | 1, heads | 1, keys)`` in float32 (float64); None adds nothing.
        query: other queries than the call's, of the same shape; rows that are the same keep their
            bits.
        every: all rows of all heads have a key with a weight, so that none needs its stock bits.

    Returns:
        ``(batch, queries, heads, value size)``.
    """
    query = call.query if query is None else query
    if query.requires_grad or query.dtype != call.query.dtype or query.stride(-1) != 1:
        return None
    if query.shape[2] > 1:
        return _many(call, weight, query)
    return _one(call, weight, query, every)


# Many queries -------------------------------------------------------------------------------------


def _many(call: Call, weight: Tensor | None, query: Tensor) -> Tensor | None:
    found = _row(call)
    if found is None:
        return None
    padding, causal = found
    row = _added(weight, query.dtype)
    if padding is not None:
        padding = padding.to(_kind(query.dtype))
        row = padding if row is None else row + padding
    mask = None if row is None else row.expand(*query.shape[:3], call.key.shape[2])
    scale = call.described_scale()
    out, _ = flash.call(query, call.key, call.value, mask, causal, scale)
    return out.transpose(1, 2).contiguous()


def _row(call: Call) -> tuple[Tensor | None, bool] | None:
    """The padding ``(batch, 1, 1, keys)`` and whether the call is causal; None: another mask."""
    if not is_shared(call) or not neutral(call.query.dtype):
        return None
    try:
        causal, padding, rest = split_bias(call.bias)
    except Refused:  # a mask we cannot describe concerns only who asks for it
        return None
    queries, keys = call.query.shape[2], call.key.shape[2]
    if rest or (causal is not None and (causal.offset != 0 or queries != keys)):
        return None
    return None if padding is None else padding.dense(), causal is not None


@functools.cache
def neutral(dtype: torch.dtype) -> bool:
    """Whether zeros in a mask leave this PyTorch's bits alone, in rows, blocks and heads."""
    if not flash.kernel():
        return False
    gen = torch.Generator().manual_seed(0)
    length = 1100  # more than two blocks of keys, and no whole number of them
    query, key, value = (
        torch.randn(1, length, heads, 16, generator=gen).to(dtype).transpose(1, 2)
        for heads in (4, 2, 2)
    )
    weight = torch.zeros(1, 4, 1, length)
    weight[:, 1::2, :, 700:] = 1.5
    if dtype == torch.float64:
        weight = weight.double()
    mask = weight.expand(1, 4, length, length)
    with torch.no_grad():
        for causal in (False, True):
            plain = flash.call(query, key, value, None, causal, 0.3)[0]
            found = flash.call(query, key, value, mask, causal, 0.3)[0]
            if not torch.equal(plain[:, ::2], found[:, ::2]):
                return False
            if causal and not torch.equal(plain[:, :, :700], found[:, :, :700]):
                return False
            if torch.equal(plain, found):
                return False
    return True


# One query ----------------------------------------------------------------------------------------


def _one(call: Call, weight: Tensor | None, query: Tensor, every: bool) -> Tensor | None:
    if not is_shared(call, least=1):
        return None
    route = _route(call)
    if route is None:
        return None
    if every and call.stock_mask() is None:
        route = "packed"  # keys are read once for a group of heads; the bits are free here
    return _run(call, weight, query, route)


def _route(call: Call) -> str | None:
    """How the stock function hands one query to the operator: grouped heads as they are, or the
    heads of a group in place of queries.

    That differs between versions and with the mask; here it is found once in each context, by bits.
    """
    mask = call.stock_mask()
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 4):
        return None
    # A step whose stock route has other sizes of mask may take another one.
    kind = None if mask is None else (mask.shape[1], mask.dtype)
    known = call.session.kept
    place = ("one query", type(call.module), call.query.dtype, call.query.shape[:2], kind)
    if place not in known:
        zeros = torch.zeros(1, 1, call.key.shape[2], dtype=_kind(call.query.dtype))
        plain, known[place] = call.plain_again(), None
        for route in ("grouped", "packed"):
            if torch.equal(_run(call, zeros, call.query, route), plain):
                known[place] = route
                break
    found: str | None = known[place]
    return found


def _run(call: Call, weight: Tensor | None, query: Tensor, route: str) -> Tensor:
    key, value = call.key, call.value
    batch, heads, _, size = query.shape
    own, keys = key.shape[1], key.shape[2]
    row, mask = _added(weight, query.dtype), call.stock_mask()
    if mask is not None:
        mask = _numbers(mask, _kind(query.dtype))
        row = mask if row is None else row + mask
    if route == "packed":
        if row is not None and row.shape[1] > 1:
            row = row.reshape(row.shape[0], own, heads // own, keys)
        query = query.reshape(batch, own, heads // own, size)
    row = None if row is None else row.expand(*query.shape[:3], keys)
    out, _ = flash.call(query, key, value, row, False, call.described_scale())
    return out.reshape(batch, 1, heads, value.shape[-1])


def _added(weight: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added per key, ``(batch | 1, heads | 1, 1, keys)``, as the operator reads it."""
    return None if weight is None else weight.detach()[:, :, None].to(_kind(dtype))


def _numbers(mask: Tensor, kind: torch.dtype) -> Tensor:
    """A stock mask as what is added to the scores."""
    if mask.dtype != torch.bool:
        return mask.to(kind)
    return torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill_(~mask, -torch.inf)


def _kind(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
