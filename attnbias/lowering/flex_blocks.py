"""Which blocks of scores a mask leaves empty, and which it leaves whole: without building it.

A block that may be seen in part is looked at entry by entry, so a cautious answer is a right one:
`possible` may say yes too often, `whole` no too often. Memory O(blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnbias.bias import Bias, MaskFunction, Neighborhood, Padding, Segments, Window
from attnbias.bias.transposed import Transposed

SIZE = 128  # queries and keys of a block


class Blocks(NamedTuple):
    """``(batch | 1, heads | 1, blocks of queries, blocks of keys)`` booleans."""

    possible: Tensor
    whole: Tensor


def blocks(masks: Sequence[Bias], queries: int, keys: int, device: torch.device) -> Blocks:
    """Of all masks together."""
    rows, cols = _edges(queries, device), _edges(keys, device)
    possible = torch.ones(1, 1, len(rows[0]), len(cols[0]), dtype=torch.bool, device=device)
    # Blocks that reach beyond the lengths are looked at entry by entry.
    fits = (rows[1] - rows[0] == SIZE - 1)[:, None] & (cols[1] - cols[0] == SIZE - 1)
    whole = fits & possible
    for mask in masks:
        found = _of(mask, queries, keys, device)
        possible, whole = possible & found.possible, whole & found.whole
    return Blocks(possible, whole)


def ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """``(how many, which first)`` of the chosen blocks of each row: what a `BlockMask` lists."""
    # The kernels read a list as one piece: a transposed one must be copied.
    chosen = chosen.contiguous()
    order = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()


def _of(mask: Bias, queries: int, keys: int, device: torch.device) -> Blocks:
    if isinstance(mask, Transposed):
        turned = _of(mask.inner, keys, queries, device)
        return Blocks(turned.possible.mT, turned.whole.mT)
    if isinstance(mask, Window):
        return _band(mask, queries, keys, device)
    if isinstance(mask, Padding):
        keep = _gathered(mask.keep.to(device), keys)[:, None, None]
        return Blocks(keep.any(-1), keep.all(-1))
    if isinstance(mask, Segments):
        (low, high), (first, last) = (
            (ids.amin(-1), ids.amax(-1))
            for ids in (
                _gathered(mask.query_ids.to(device), queries)[:, None, :, None],
                _gathered(mask.key_ids.to(device), keys)[:, None, None],
            )
        )
        return Blocks(
            (low <= last) & (first <= high), (low == high) & (low == first) & (low == last)
        )
    if isinstance(mask, Neighborhood):
        return _near(mask, queries, keys, device)
    assert isinstance(mask, MaskFunction)
    return _rule(mask, queries, keys, device)


def _band(mask: Window, queries: int, keys: int, device: torch.device) -> Blocks:
    (start, stop), (first, last) = _edges(queries, device), _edges(keys, device)
    least = (first - stop[:, None])[None, None]
    most = (last - start[:, None])[None, None]
    possible = whole = torch.ones_like(least, dtype=torch.bool)
    low, high = mask.band()
    if low is not None:
        possible, whole = possible & (most >= low), whole & (least >= low)
    if high is not None:
        possible, whole = possible & (least <= high), whole & (most <= high)
    return Blocks(possible, whole)


def _near(mask: Neighborhood, queries: int, keys: int, device: torch.device) -> Blocks:
    possible: Tensor | None = None
    whole: Tensor | None = None
    for dim, ends in enumerate(zip(*mask.windows(), strict=True)):
        first, last = (_gathered(end.to(device), queries) for end in ends[:2])
        place = _gathered(ends[2].to(device), keys)
        low, high = place.amin(-1), place.amax(-1)
        met = (high >= first.amin(-1)[:, None]) & (low <= last.amax(-1)[:, None])
        all_met = (low >= first.amax(-1)[:, None]) & (high <= last.amin(-1)[:, None])
        if mask.dilation[dim] > 1:
            all_met = torch.zeros_like(all_met)
        possible = met if possible is None else possible & met
        whole = all_met if whole is None else whole & all_met
    assert possible is not None
    assert whole is not None
    return Blocks(possible[None, None], whole[None, None])


def _rule(mask: MaskFunction, queries: int, keys: int, device: torch.device) -> Blocks:
    """Asked entry by entry, the rows of one block at a time."""
    possible, whole = [], []
    for start in range(0, queries, SIZE):
        rows = slice(start, min(start + SIZE, queries))
        seen = mask.block(rows, slice(0, keys)).to(device) == 0
        parts = _gathered(seen, keys)
        possible.append(parts.any(-1).any(-2))
        whole.append(parts.all(-1).all(-2))
    return Blocks(torch.stack(possible, 2), torch.stack(whole, 2))


def _edges(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last place of each block."""
    start = torch.arange(0, length, SIZE, device=device)
    return start, (start + SIZE).clamp(max=length) - 1


def _gathered(tensor: Tensor, length: int) -> Tensor:
    """``(..., length)`` to ``(..., blocks, SIZE)``, the last one filled up with its last entry."""
    count = -(-length // SIZE)
    place = torch.arange(count * SIZE, device=tensor.device).clamp(max=length - 1)
    return tensor[..., place].reshape(*tensor.shape[:-1], count, SIZE)
