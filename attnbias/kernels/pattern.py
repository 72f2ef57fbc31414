"""The dropout pattern of `attnbias.lowering.dropout` in a kernel: the same bits on every device."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B1)
ROUND_ONE = tl.constexpr(0x7FEB352D)
ROUND_TWO = tl.constexpr(0x846CA68B)


class Drop(NamedTuple):
    """Keys of the rows ``one[b, h, i]``, ``two[b, h, i]`` as 32-bit integers (heads x n apart and n
    apart), hashes below `limit` are dropped, weights that stay are multiplied with `factor`.
    """

    one: Any
    two: Any
    batch: Any
    head: Any
    limit: Any
    factor: Any


@triton.jit
def kept_tile(drop, b, h, i, j):
    """True where the weight is kept. Rows that are not there read the last one's keys. h: a number,
    or a column ``(rows, 1)``.
    """
    n = drop.head
    at = b * drop.batch + h * drop.head + tl.minimum(i, n - 1)[:, None]
    one = tl.load(drop.one + at).to(tl.uint32)
    two = tl.load(drop.two + at).to(tl.uint32)
    x = (j.to(tl.uint32) * GOLDEN)[None, :] + one
    x = x ^ (x >> 16)
    x = x * ROUND_ONE
    x = x ^ two
    x = x ^ (x >> 15)
    x = x * ROUND_TWO
    x = x ^ (x >> 16)
    return x >= drop.limit
