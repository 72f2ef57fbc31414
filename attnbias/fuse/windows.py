"""Attention in the windows of an image, for the families that cut one into windows.

The windows of a map are the batch of one attention. In a map that was rolled by half a window those
at its last row and column hold tokens that were no neighbours: there are four kinds of windows at
most, each with one mask that all of its kind share. Tokens are brought into the order of kinds by
one copy (pad, roll and partition in one), and back by another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbias.bias import Bias, Bucketed, GridRelative
from attnbias.forms.swin import shifted_windows
from attnbias.fuse import modes
from attnbias.fuse.family import compute
from attnbias.fuse.masked import Masked, forward

# Entries of the masks of all kinds that a module keeps between calls: 2 MB in float32.
KEPT = 2**19
# Entries of the masks of all kinds, up to which they are made at all: 16 MB.
LARGEST = 2**22
_KINDS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Windows:
    """How a batch of maps is cut: windows sorted by kind, their tokens row-major.

    Attributes:
        window, shift: sizes in tokens. count: windows of the batch.
        order: ``(windows * tokens)``, the row of ``(batch * height * width)`` of each slot; 0 for a
            slot of the padding, which `padding` lists.
        inverse: the slot of each row. kinds: numbers of kinds with their slices of the windows.
    """

    window: int
    shift: int
    count: int
    order: Tensor
    inverse: Tensor
    padding: Tensor
    kinds: tuple[tuple[int, slice], ...]

    @property
    def tokens(self) -> int:
        return self.window**2


@modes.outside_graphs
@lru_cache(maxsize=32)
@torch.inference_mode(False)
def cut(images: int, height: int, width: int, window: int, shift: int) -> Windows:
    """The windows of maps ``(images, height, width)``, padded at the end, rolled by ``-shift``."""
    down, across = -(-height // window), -(-width // window)
    places = torch.full((images, down * window, across * window), -1)
    places[:, :height, :width] = torch.arange(images * height * width).view(images, height, width)
    if shift:
        places = places.roll((-shift, -shift), (1, 2))
    places = places.view(images, down, window, across, window).transpose(2, 3)
    kind = torch.zeros(images, down, across, dtype=torch.long)
    if shift:
        kind[:, -1] += 2
        kind[:, :, -1] += 1
    places, kind = places.reshape(-1, window * window), kind.flatten()
    by_kind = kind.argsort(stable=True)
    order, kind = places[by_kind].flatten(), kind[by_kind]
    real = (order >= 0).nonzero().flatten()
    inverse = torch.empty(images * height * width, dtype=torch.long)
    inverse[order[real]] = real
    counts = kind.bincount(minlength=4)
    ends = counts.cumsum(0).tolist()
    kinds = tuple(
        (number, slice(end - size, end))
        for number, (size, end) in enumerate(zip(counts.tolist(), ends, strict=True))
        if size
    )
    padding = (order < 0).nonzero().flatten()
    rows, slots = order.clamp(min=0).int(), inverse.int()
    return Windows(window, shift, len(kind), rows, slots, padding, kinds)


class _Move(torch.autograd.Function):
    """Rows of `tensor` by `to`, zeros at `empty`; the gradient goes back by `back`."""

    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, to: Tensor, empty: Tensor, back: Tensor, lost: Tensor
    ) -> Tensor:
        ctx.plan = (back, lost, to, empty)
        made = tensor.index_select(0, to)
        return made.index_fill_(0, empty, 0) if empty.numel() else made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        back, lost, _, _ = ctx.plan
        made = grad.index_select(0, back)
        return made.index_fill_(0, lost, 0) if lost.numel() else made, None, None, None, None


_NOTHING = torch.empty(0, dtype=torch.long)


def into(tensor: Tensor, windows: Windows) -> Tensor:
    """``(images, height * width, C)`` to ``(windows, tokens, C)``, zeros at the padding."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    moved: Tensor = _Move.apply(  # type: ignore[no-untyped-call]
        rows, windows.order, windows.padding, windows.inverse, _NOTHING
    )
    return moved.view(windows.count, windows.tokens, tensor.shape[-1])


def back(tensor: Tensor, windows: Windows, images: int) -> Tensor:
    """The way back of `into`; what stands at the padding is left out."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    moved: Tensor = _Move.apply(  # type: ignore[no-untyped-call]
        rows, windows.inverse, _NOTHING, windows.order, windows.padding
    )
    return moved.view(images, -1, tensor.shape[-1])


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _regions(window: int, shift: int) -> Tensor:
    """``(kinds, tokens)``: tokens with the same number were neighbours before the roll."""
    if not shift:
        return torch.zeros(1, window * window, dtype=torch.long)
    return shifted_windows((2 * window, 2 * window), window, shift).query_ids.clone()


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _costs(window: int, shift: int, hidden: float) -> Tensor:
    """``(kinds, 1, tokens, tokens)``: `hidden` on pairs that were no neighbours."""
    ids = _regions(window, shift)
    apart = ids[:, None, :, None] != ids[:, None, None, :]
    return torch.zeros(apart.shape).masked_fill_(apart, hidden)


def _masks(table: Tensor, windows: Windows, hidden: float) -> Tensor:
    """``(kinds, heads, tokens, tokens)`` of one kind without a shift, else of all four."""
    grid = GridRelative(table, (windows.window, windows.window)).dense()
    if not windows.shift:
        return grid
    return grid + _costs(windows.window, windows.shift, hidden).to(grid.device)


def _bias(table: Tensor, windows: Windows, kind: int, hidden: float) -> Bias:
    """The same for one kind of window, as a structure."""
    grid = GridRelative(table, (windows.window, windows.window))
    if kind == 0:
        return grid
    # Nine regions at most.
    ids = _regions(windows.window, windows.shift)[kind][None, None]
    cost = torch.full((9, 9), hidden).fill_diagonal_(0.0)
    return grid + Bucketed(cost[None, None], ids, ids)


class Kept:
    """The masks of a module's windows, as long as what they are made of stays the same."""

    def __init__(self) -> None:
        self._found: tuple[tuple[Tensor, ...], tuple[int, int, float], Tensor] | None = None

    def masks(
        self,
        sources: tuple[Tensor, ...],
        table: Callable[[], Tensor],
        windows: Windows,
        hidden: float,
    ) -> Tensor:
        """``(kinds, heads, tokens, tokens)`` of one kind without a shift, else of all four.

        Sources are compared entry by entry: a table may change in ways that leave no trace.
        """
        key = (windows.window, windows.shift, hidden)
        found = self._found
        if (
            found is not None
            and found[1] == key
            and len(found[0]) == len(sources)
            and (torch.is_inference_mode_enabled() or not found[2].is_inference())
            and all(_same(one, other) for one, other in zip(found[0], sources, strict=True))
        ):
            return found[2]
        masks = _masks(table().detach(), windows, hidden)
        if masks.numel() <= KEPT:
            self._found = (tuple(one.detach().clone() for one in sources), key, masks)
        else:
            self._found = None
        return masks


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@modes.outside_graphs
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sources: tuple[Tensor, ...],
    table: Callable[[], Tensor],
    windows: Windows,
    kept: Kept,
    *,
    scale: float | None = None,
    hidden: float = -100.0,
    dropout: float = 0.0,
) -> Tensor:
    """Attention in windows, ``(windows, tokens, heads, size)`` from ``(windows, heads, tokens,
    size)``.

    Args:
        sources: tensors that the table depends on; masks are kept while they stay the same.
        table: makes ``(heads, 2 window - 1, 2 window - 1)`` by key minus query.
        kept: where masks are kept from call to call.
        hidden: what the model adds where two tokens were no neighbours: a number, which hides them
            as long as scores are small beside it.
    """
    heads, tokens = query.shape[1], windows.tokens
    entries = heads * tokens**2 * (4 if windows.shift else 1)
    plain = query.dtype in _KINDS and not torch.is_autocast_enabled(query.device.type)
    if dropout or entries > LARGEST or not plain:
        made = table()
        parts = [
            compute(
                query[part],
                key[part],
                value[part],
                _bias(made, windows, kind, hidden),
                scale=scale,
                dropout=dropout,
            )
            for kind, part in windows.kinds
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    # A layer can have a single window: to choose a way for it would take longer than it takes.
    seen = modes.record()
    if seen is not None:
        seen.append((f"masks of {len(windows.kinds)} kinds of windows", "windows"))
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    grad = torch.is_grad_enabled()
    if grad and any(one.requires_grad for one in sources):
        masks = _masks(table(), windows, hidden)
    else:
        masks = kept.masks(sources, table, windows, hidden)
    if grad and any(one.requires_grad for one in (query, key, value, masks)):
        out = Masked.apply(query, key, value, masks, windows.kinds, scale)  # type: ignore[no-untyped-call]
    else:
        out, _ = forward(query, key, value, masks, windows.kinds, scale)
    found: Tensor = out.transpose(1, 2)
    return found
