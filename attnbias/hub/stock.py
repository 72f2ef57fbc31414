"""The model's own attention, reached exactly as the model would have reached it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.bias import Bias, Padding, Window
from attnbias.errors import Refused
from attnbias.hub.sites import REGISTRY, UPCAST, calling_function, eager_function
from attnbias.lowering import flash

if TYPE_CHECKING:
    from attnbias.hub.call import Call

Stock = Callable[..., tuple[Tensor, Any]]
# A float mask larger than this is not built only to get a log-sum-exp (in numbers: 64 MB).
_LARGEST_MASK = 2**24


def stock_attention(module: nn.Module, original: str) -> Stock:
    """The function `module` would have called. Looked up anew: another library may wrap it."""
    if original == "eager" and getattr(module, UPCAST, False):
        return _upcast  # GPT-2 and its kin leave the interface aside for this option
    function = calling_function(type(module))
    assert function is not None
    registry = function.__globals__[REGISTRY]
    if original == "eager":
        found = registry.get("eager", eager_function(type(module)))
    else:
        found = registry[original]
    if found is None:
        raise Refused(f"{type(module).__name__} has no eager attention function that can be found.")
    stock: Stock = found
    return stock


def _upcast(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, Any]:
    result: tuple[Tensor, Any] = module._upcast_and_reordered_attn(query, key, value, mask)
    return result


def shared_flash(call: Call) -> tuple[Tensor, Tensor] | None:
    """The stock sdpa output with its log-sum-exp from one fused call, or None where it may differ.

    Stock sdpa on CPU ends in the same operator and drops its second result. Calling the operator
    directly is bitwise equal (a test holds this), also when a causal mask with padding is given as
    a key mask of stride 0 instead of the N x N tensor that stock builds. Output ``(batch, queries,
    heads, dim)``; log-sum-exp ``(batch, heads, queries)``, float32 (float64 for float64).
    """
    query, key, value = call.query, call.key, call.value
    if not is_shared(call):
        return None
    try:
        found = _mask_of(call)
    except Refused:  # a mask we cannot describe concerns only who asks for it
        found = None
    if found is None:
        return None
    mask, causal = found
    out, lse = flash.call(query, key, value, mask, causal, call.described_scale())
    lse = flash.hide_empty(lse, mask, causal)
    return out.transpose(1, 2).contiguous(), lse


def is_shared(call: Call, least: int = 2) -> bool:
    """Whether stock attention ends in the CPU operator with these very tensors.

    least: how many queries there must be; for a single one versions differ in how they group heads.
    """
    query, key, value = call.query, call.key, call.value
    tensors = (query, key, value)
    return not (
        call.original != "sdpa"
        or not _is_stock_sdpa(call)
        or call.dropout > 0
        or query.shape[2] < least
        or 0 in (*query.shape, *key.shape)
        or key.shape[-1] != value.shape[-1]
        or query.shape[0] != key.shape[0]
        or query.device.type != "cpu"
        or not flash.kernel()
        or not _flash_enabled()
        or torch.is_autocast_enabled("cpu")
        or any(one.stride(-1) != 1 or one.dtype != query.dtype for one in tensors)
        or (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    )


def plain_rows(call: Call, rows: Sequence[int]) -> Tensor | None:
    """The stock output of some queries, by the stock function itself, or None: take it whole.

    For transformers' own sdpa function, whose rows do not depend on each other. Equal to the whole
    call's up to rounding. Output ``(batch, rows, heads, dim)``.
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    if call.original != "sdpa" or not _is_stock_sdpa(call) or queries < 4 * len(rows):
        return None
    index = torch.tensor(list(rows), device=call.query.device)
    mask = call.stock_mask()
    if isinstance(mask, Tensor) and mask.ndim == 4:
        mask = mask.index_select(2, index) if mask.shape[2] == queries else mask
    elif mask is not None:
        return None
    elif call.asks_causal():
        mask = (torch.arange(keys, device=index.device) <= index[:, None])[None, None]
    tensors = (call.query.index_select(2, index), call.key, call.value)
    return call.stock_with(tensors, mask, is_causal=False)


def plain_part(call: Call, needed: Tensor) -> Tensor | None:
    """The stock output where it is needed, bit for bit, or None: take it whole.

    The CPU operator goes through queries in blocks of 256 (from 768 queries on) and keys in blocks
    of 512, for each head by itself: a head left out, or the queries after a whole number of blocks,
    change no bit of the rest (`whole_blocks` looks at this PyTorch, a test at more sizes).

    Args:
        needed: bool ``(batch, heads, queries)``.

    Returns:
        ``(batch, queries, heads, dim)``, 0 where it was not computed.
    """
    query, key, value = call.query, call.key, call.value
    heads, queries = query.shape[1:3]
    if queries < 2 * KEY_BLOCK or query.dtype not in (torch.float32, torch.float64):
        return None
    if not whole_blocks() or not is_shared(call):
        return None
    try:
        found = _mask_of(call)
    except Refused:
        return None
    if found is None or found[0] is not None:
        return None
    causal = found[1]
    places = torch.arange(1, queries + 1, device=needed.device)
    last = torch.where(needed, places, 0).amax(-1).amax(0).tolist()
    stops = [min(queries, max(3, -(-one // BLOCK)) * BLOCK) if one else 0 for one in last]
    cost = sum((one / queries) ** (2 if causal else 1) for one in stops) / heads
    if cost > 0.8:
        return None
    out = query.new_zeros(query.shape[0], queries, heads, value.shape[-1])
    group = heads // key.shape[1]
    first = 0
    while first < heads:
        # Views alone: the operator then reads what it would have read, in the same places.
        whole = first % group == 0
        stop = first + 1
        while stop < heads and stops[stop] == stops[first] and (whole or stop % group):
            stop += 1
        if whole and stop - first > group:
            stop -= (stop - first) % group
        rows = stops[first]
        if rows:
            own = slice(first // group, -(-stop // group))
            seen = _seen(rows, key.shape[2], causal)
            part, _ = flash.call(
                query[:, first:stop, :rows],
                key[:, own, seen],
                value[:, own, seen],
                None,
                causal,
                call.described_scale(),
            )
            out[:, :rows, first:stop] = part.transpose(1, 2)
        first = stop
    return out


BLOCK, KEY_BLOCK = 256, 512  # queries and keys that the CPU operator takes together


def _seen(rows: int, keys: int, causal: bool) -> slice:
    """The keys for some first queries: whole blocks, also where the mask hides their ends."""
    return slice(0, min(keys, -(-rows // KEY_BLOCK) * KEY_BLOCK) if causal else keys)


@functools.cache
def whole_blocks() -> bool:
    """Whether fewer heads, or fewer whole blocks of queries, leave this PyTorch's bits alone."""
    if not flash.kernel():
        return False
    gen = torch.Generator().manual_seed(0)
    length, stop = 3 * KEY_BLOCK + 40, 3 * BLOCK
    q, k, v = (torch.randn(1, length, h, 16, generator=gen).transpose(1, 2) for h in (4, 2, 2))
    with torch.no_grad():
        for causal in (False, True):
            whole = flash.call(q, k, v, None, causal, 0.3)[0]
            seen = _seen(stop, length, causal)
            part = flash.call(
                q[:, 2:3, :stop], k[:, 1:2, seen], v[:, 1:2, seen], None, causal, 0.3
            )[0]
            if not torch.equal(part, whole[:, 2:3, :stop]):
                return False
    return True


def _flash_enabled() -> bool:
    """The switch of `torch.nn.attention.sdpa_kernel`, which rules the CPU operator, too."""
    return bool(torch.backends.cuda.flash_sdp_enabled())  # type: ignore[no-untyped-call]


def _is_stock_sdpa(call: Call) -> bool:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if call.stock is not sdpa_attention_forward or call.opaque() is not None:
        return False
    return call.argument("position_bias") is None


def _mask_of(call: Call) -> tuple[Tensor | None, bool] | None:
    """``(mask, causal)`` for the operator, which aligns `causal` to the start."""
    queries, keys = call.query.shape[2], call.key.shape[2]
    causal, padding, rest = split_bias(call.bias)
    if rest or (causal is not None and (causal.offset != 0 or queries != keys)):
        # Before an empty static cache some versions cut the keys and some take another kernel.
        return _float_mask(call)
    mask = None if padding is None else padding.dense()
    if mask is not None:
        mask = mask.to(call.query.device).expand(*call.query.shape[:3], keys)
    return mask, causal is not None


def split_bias(bias: Bias | None) -> tuple[Window | None, Padding | None, list[Bias]]:
    """The causal mask, the padding and the rest of a call's bias."""
    causal, padding, rest = None, None, []
    for term in [] if bias is None else bias.terms():
        if isinstance(term, Window) and term.before is None and term.after == 0:
            causal = term
        elif isinstance(term, Padding):
            padding = term
        else:
            rest.append(term)
    return causal, padding, rest


def _float_mask(call: Call) -> tuple[Tensor, bool] | None:
    """The N x N mask that stock builds anyway, as the numbers that stock makes of it."""
    mask = call.stock_mask()
    if not isinstance(mask, Tensor) or mask.numel() > _LARGEST_MASK:
        return None
    if mask.dtype == torch.bool:
        kind = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        mask = torch.zeros(mask.shape, dtype=kind, device=mask.device).masked_fill(
            ~mask, -torch.inf
        )
    elif mask.dtype not in (torch.float32, call.query.dtype):
        return None
    return mask.expand(*call.query.shape[:3], call.key.shape[2]), False
