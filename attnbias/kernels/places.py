"""Which keys a query sees, where that is a range: bands, packed segments, padding at the ends."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Places(NamedTuple):
    """A band ``low <= j - i <= high`` (BAND: which sides there are, 1 low, 2 high) and, with
    RANGES, ``first[b, i] <= j < last[b, i]``, 32-bit; batch is the step of both.
    """

    low: Any
    high: Any
    first: Any
    last: Any
    batch: Any


@triton.jit
def span(
    places, b, block, i, im, n, m, BAND: tl.constexpr, RANGES: tl.constexpr, ROWS: tl.constexpr
):
    """The first key and the end of those that any row of a block sees."""
    first = tl.zeros((), tl.int32)
    last = first + m
    top = block * ROWS
    bottom = tl.minimum(top + ROWS, n) - 1
    if BAND % 2 == 1:
        first = tl.maximum(first, top + places.low)
    if BAND >= 2:
        last = tl.minimum(last, bottom + places.high + 1)
    if RANGES:
        at = b * places.batch + i
        first = tl.maximum(first, tl.min(tl.load(places.first + at, mask=im, other=m), 0))
        last = tl.minimum(last, tl.max(tl.load(places.last + at, mask=im, other=0), 0))
    return first, last


@triton.jit
def whole_span(
    places, b, block, i, im, n, m, BAND: tl.constexpr, RANGES: tl.constexpr, ROWS: tl.constexpr
):
    """The first key and the end of those that every row of a block sees: between them no entry is
    hidden. The end may lie before the first.
    """
    first = tl.zeros((), tl.int32)
    last = first + m
    top = block * ROWS
    bottom = tl.minimum(top + ROWS, n) - 1
    if BAND % 2 == 1:
        first = tl.maximum(first, bottom + places.low)
    if BAND >= 2:
        last = tl.minimum(last, top + places.high + 1)
    if RANGES:
        at = b * places.batch + i
        first = tl.maximum(first, tl.max(tl.load(places.first + at, mask=im, other=0), 0))
        last = tl.minimum(last, tl.min(tl.load(places.last + at, mask=im, other=m), 0))
    return first, last


@triton.jit
def seen_tile(places, b, i, j, im, jm, BAND: tl.constexpr, RANGES: tl.constexpr):
    """Which entries of a tile are seen."""
    seen = im[:, None] & jm[None, :]
    step = j[None, :] - i[:, None]
    if BAND % 2 == 1:
        seen = seen & (step >= places.low)
    if BAND >= 2:
        seen = seen & (step <= places.high)
    if RANGES:
        at = b * places.batch + i
        first = tl.load(places.first + at, mask=im, other=0)
        last = tl.load(places.last + at, mask=im, other=0)
        seen = seen & (j[None, :] >= first[:, None]) & (j[None, :] < last[:, None])
    return seen
