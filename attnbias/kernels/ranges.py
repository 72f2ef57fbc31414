"""Ranges of keys: what padding and packed segments leave of the keys of a query.

Where the keys that a query sees are one range, the kernels look at nothing outside it and need no
mask inside; where they are not, the range that holds them still bounds the tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from attnbias.kernels.places import Places

# Finding out costs a few passes over the ids and one wait for the device: once for each tensor.
_known: Any = WeakTensorKeyDictionary()


class Ranges(NamedTuple):
    """``first <= j < last``, both ``(batch | 1, queries | 1)`` in 32 bits; `whole`: every key in it
    is seen, so that nothing else of the mask is left.
    """

    first: Tensor
    last: Tensor
    whole: bool


def of_padding(keep: Tensor) -> Ranges:
    """``keep (batch | 1, keys)``, True is a real key."""
    return _once(keep, keep, lambda: _of_padding(keep))


def of_segments(query_ids: Tensor, key_ids: Tensor) -> Ranges:
    """Ids ``(batch | 1, queries)`` and ``(batch | 1, keys)``; a query sees the keys of its id."""
    return _once(key_ids, query_ids, lambda: _of_segments(query_ids, key_ids))


def meet(one: Ranges | None, two: Ranges) -> Ranges:
    """What both leave."""
    if one is None:
        return two
    return Ranges(
        torch.maximum(one.first, two.first),
        torch.minimum(one.last, two.last),
        one.whole and two.whole,
    )


def places(
    band: tuple[int | None, int | None], ranges: Ranges | None, queries: int, keys: int
) -> tuple[Places, int, bool]:
    """What the kernels read of a band and of ranges, and their constants BAND and RANGES. A side
    of the band that hides nothing is left out.
    """
    low, high = band
    low = None if low is None or low <= 1 - queries else low
    high = None if high is None or high >= keys - 1 else high
    kind = (low is not None) + 2 * (high is not None)
    if ranges is None:
        return Places(low or 0, high or 0, None, None, 0), kind, False
    first, last = torch.broadcast_tensors(ranges.first, ranges.last)
    first, last = (t.expand(-1, queries).contiguous() for t in (first, last))
    step = 0 if first.shape[0] == 1 else queries
    return Places(low or 0, high or 0, first, last, step), kind, True


def _once(key: Tensor, other: Tensor, make: Any) -> Ranges:
    """`make()`, or what it gave for the same two tensors, unchanged since."""
    if key.is_inference() or other.is_inference():  # they do not count their changes
        made: Ranges = make()
        return made
    state = (id(other), key._version, other._version)
    if key not in _known or _known[key][0] != state:
        # The other tensor is held, so that its id stays its own.
        _known[key] = (state, make(), None if other is key else other)
    found: Ranges = _known[key][1]
    return found


def _of_padding(keep: Tensor) -> Ranges:
    count = keep.sum(-1, keepdim=True)
    if keep.shape[-1] == 0:
        return Ranges(count.int(), count.int(), True)
    bits = keep.to(torch.uint8)
    first = bits.argmax(-1, keepdim=True)
    last = keep.shape[-1] - bits.flip(-1).argmax(-1, keepdim=True)
    first, last = (torch.where(count > 0, t, 0) for t in (first, last))
    return Ranges(first.int(), last.int(), bool((last - first == count).all()))


def _of_segments(query_ids: Tensor, key_ids: Tensor) -> Ranges:
    batch = max(query_ids.shape[0], key_ids.shape[0])
    queries, keys = (t.long().expand(batch, -1).contiguous() for t in (query_ids, key_ids))
    if keys.shape[-1] == 0:
        nothing = torch.zeros_like(queries, dtype=torch.int32)
        return Ranges(nothing, nothing, True)
    ranked, order = keys.sort(dim=-1, stable=True)
    low, high = (torch.searchsorted(ranked, queries, right=right) for right in (False, True))
    count = high - low
    first = order.gather(-1, low.clamp(max=keys.shape[-1] - 1))
    last = order.gather(-1, (high - 1).clamp(min=0)) + 1
    first, last = (torch.where(count > 0, t, 0) for t in (first, last))
    return Ranges(first.int(), last.int(), bool((last - first == count).all()))


__all__ = ["Ranges", "meet", "of_padding", "of_segments", "places"]
