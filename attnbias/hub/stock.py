"""The model's own attention, reached exactly as the model would have reached it."""

from __future__ import annotations

from collections.abc import Callable
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
    tensors = (query, key, value)
    if (
        call.original != "sdpa"
        or not _is_stock_sdpa(call)
        or call.dropout > 0
        or query.shape[2] < 2
        or 0 in (*query.shape, *key.shape)
        or key.shape[-1] != value.shape[-1]
        or query.shape[0] != key.shape[0]
        or query.device.type != "cpu"
        or not flash.kernel()
        or not _flash_enabled()
        or torch.is_autocast_enabled("cpu")
        or any(one.stride(-1) != 1 or one.dtype != query.dtype for one in tensors)
        or (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    ):
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
    causal, padding, rest = _split(call.bias)
    if rest or (causal is not None and (causal.offset != 0 or queries != keys)):
        # Before an empty static cache some versions cut the keys and some take another kernel.
        return _float_mask(call)
    mask = None if padding is None else padding.dense()
    if mask is not None:
        mask = mask.to(call.query.device).expand(*call.query.shape[:3], keys)
    return mask, causal is not None


def _split(bias: Bias | None) -> tuple[Window | None, Padding | None, list[Bias]]:
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
