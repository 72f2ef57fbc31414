"""PyTorch's fused operators of GPUs, with the contract of `flash.call`.

Two operators, called by name and never through PyTorch's own choice, which may take cuDNN: that one
has read float32 masks next to half queries as half, and lost gradients where a length is 64 modulo
128. `flash` (no mask, half formats) is the fast one; `efficient` takes masks, which it wants in the
format of the queries, in rows that begin at 16 bytes. A mask in half precision is wrong by whole
logits, so half queries with a mask are computed in float32. A mask whose rows begin anywhere, a
strided view for one, is copied in tiles of rows. What the operators say of a row that sees no key
is not read: the mask tells which rows those are. The backward passes run in PyTorch's deterministic
mode.

None of this is taken on trust: before its first use on a device each operator is compared with
plain PyTorch on a small problem of every kind (`works`), and where it differs it is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from attnbias.lowering import plain
from attnbias.lowering.flash_probe import works
from attnbias.lowering.flash_tiles import joined, tiles, wide, without_a_key

HALF = (torch.float16, torch.bfloat16)
WIDEST = 256  # features of a head
LARGE = ((8, 0), (9, 0), (10, 0))  # compute capabilities
LSE_STEP = 32  # the `efficient` operator pads the log-sum-exp to a multiple of this


def takes(query: Tensor) -> bool:
    """Whether `call` computes problems with such queries, after both head sizes were made equal."""
    if query.device.type != "cuda" or query.dtype not in (*HALF, torch.float32):
        return False
    return query.shape[-1] <= WIDEST and works("efficient", torch.float32, query.device)


def call(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """As `flash.call`: output, and a log-sum-exp that is 0 in rows without a key."""
    return call_by(_route(query, key, mask, causal), query, key, value, mask, causal, scale)


def call_by(
    route: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`call` by one of the two operators, ``"flash"`` or ``"efficient"``."""
    size, given = query.shape[-1], query.dtype
    kind = given if route == "flash" else torch.float32
    query, key, value = (wide(t.to(kind)) for t in (query, key, value))
    calls, outs, lses = [], [], []
    for tile in tiles(query, key, mask, causal):
        at = (tile.batch, slice(None), slice(0, tile.keys))
        q, k, v = query[tile.batch, :, tile.rows], key[at], value[at]
        if route == "flash":
            out, lse = flash_forward(q, k, v, tile.causal, scale)
        else:
            k, v = (plain.repeat_heads(t, query.shape[1]) for t in (k, v))
            out, lse = efficient_forward(q, k, v, tile.mask, tile.causal, scale)
        if tile.mask is not None:
            empty = without_a_key(tile.mask, tile.causal)
            out, lse = out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, 0.0)
        calls.append(tile)
        outs.append(out)
        lses.append(lse)
    return joined(outs, calls)[..., :size].to(given), joined(lses, calls).contiguous()


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
    """As `flash.call_backward`; `lse` is what `call` returned."""
    route = _route(query, key, mask, causal)
    return backward_by(route, grad, query, key, value, out, lse, mask, causal, scale)


def backward_by(
    route: str,
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
    """`call_backward` by one of the two operators."""
    size, given, heads = query.shape[-1], query.dtype, query.shape[1]
    kind = given if route == "flash" else torch.float32
    grad, query, key, value, out = (wide(t.to(kind)) for t in (grad, query, key, value, out))
    dq = torch.empty_like(query, memory_format=torch.contiguous_format)
    dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=t.device) for t in (key, value))
    for tile in tiles(query, key, mask, causal):
        at = (tile.batch, slice(None), tile.rows)
        keys = (tile.batch, slice(None), slice(0, tile.keys))
        g, q, o, s, k, v = grad[at], query[at], out[at], lse[at], key[keys], value[keys]
        with _repeatable():
            if route == "flash":
                a, b, c = flash_backward(g, q, k, v, o, s, tile.causal, scale)
            else:
                k, v = (plain.repeat_heads(t, heads) for t in (k, v))
                a, b, c = efficient_backward(g, q, k, v, o, s, tile.mask, tile.causal, scale)
        dq[at] = a
        dk[keys] += plain.sum_groups(b.float(), key.shape[1])
        dv[keys] += plain.sum_groups(c.float(), key.shape[1])
    dq, dk, dv = (t[..., :size].to(given) for t in (dq, dk, dv))
    return dq, dk, dv


def flash_forward(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    found = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return found[0], found[1]


def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of dropout: there is none
    found: tuple[Tensor, Tensor, Tensor]
    found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad,
        query,
        key,
        value,
        out,
        lse.contiguous(),
        None,
        None,
        query.shape[2],
        key.shape[2],
        0.0,
        causal,
        state,
        torch.zeros((), dtype=torch.uint64, device=query.device),
        scale=scale,
    )
    return found


def efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, True, 0.0, causal, scale=scale
    )
    return out, lse[:, :, : query.shape[2]]


def efficient_backward(
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
    if torch.version.hip is None:
        lse = F.pad(lse, (0, -lse.shape[-1] % LSE_STEP), value=torch.inf)
    seed = torch.zeros((), dtype=torch.long, device=query.device)  # of dropout: there is none
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        grad,
        query,
        key,
        value,
        mask,
        out,
        lse.contiguous(),
        seed,
        seed,
        0.0,
        [True, True, True, False],
        causal,
        scale=scale,
    )
    return dq, dk, dv


def _route(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> str:
    # Of unequal lengths its causal mask is that of the end, not that of the start; keys beyond the
    # last query are never seen, and cut.
    fits = mask is None and (not causal or query.shape[2] <= key.shape[2])
    fits = fits and query.dtype in HALF and (query.shape[-1] <= 192 or _large(query.device))
    return "flash" if fits and works("flash", query.dtype, query.device) else "efficient"


def _large(device: torch.device) -> bool:
    """Whether its chip has the shared memory that the backward of large heads needs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in LARGE


@contextmanager
def _repeatable() -> Iterator[None]:
    """PyTorch's deterministic algorithms inside: the operators sum in a fixed order then."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
