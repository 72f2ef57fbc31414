"""Softmax attention in one compiled loop over blocks of queries: products, bias and exponentials of
a tile while it is in the cache.

Arrays are flat; with each goes a tuple of steps, ``(batch, head, row)`` as far as it has them, 0
where it is broadcast, and rows are contiguous. An array without entries is a part that is not
there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnbias.native.jit import exp32, inline, inner, kernel, prange
from attnbias.native.product import PANEL, ROWS, add_product, set_panel

BLOCK = 64  # queries of a block
TILE = 512  # keys of a tile
PAD = 16  # between rows of a tile: rows a power of two apart would share few lines of the cache
DEPTH = 128  # keys of one product with the values
_FLIP = np.int32(0x7FFFFFFF)


@kernel
def pack(key: Any, steps: Any, more: Any, more_steps: Any, panels: Any, sizes: Any) -> None:
    """Keys, and columns beside them, as panels of `PANEL` keys with one row for each feature.

    panels ``(batch x heads, panels, size + columns, PANEL)``, zeros after the last key. sizes:
    batch, heads, keys, size, columns.
    """
    batch, heads, m, size, extra = sizes
    wide = size + extra
    count = (m + PANEL - 1) // PANEL
    for place in prange(batch * heads * count):
        unit, number = place // count, place % count
        b, h = unit // heads, unit % heads
        into = panels[place * wide * PANEL : (place + 1) * wide * PANEL]
        first = number * PANEL
        have = min(PANEL, m - first)
        if have < PANEL:
            into[:] = np.float32(0)
        for j in range(have):
            start = b * steps[0] + h * steps[1] + (first + j) * steps[2]
            line = key[start : start + size]
            for x in range(size):
                into[x * PANEL + j] = line[x]
            if extra:
                start = b * more_steps[0] + h * more_steps[1] + (first + j) * more_steps[2]
                line = more[start : start + extra]
                for x in range(extra):
                    into[(size + x) * PANEL + j] = line[x]


@inline
def largest(line: Any) -> Any:
    """The maximum, by integers of the same order: 16 lanes at once, where NaN would allow one."""
    best = np.int32(-2139095041)  # minus infinity
    for j in range(line.shape[0]):
        bits = np.float32(line[j]).view(np.int32)
        best = max(best, np.int32(bits ^ ((bits >> np.int32(31)) & _FLIP)))
    return np.int32(best ^ ((best >> np.int32(31)) & _FLIP)).view(np.float32)


@inline
def plus(line: Any, other: Any) -> None:
    for j in range(line.shape[0]):
        line[j] += other[j]


@inline
def drop_line(line: Any, start: int, one: Any, two: Any, least: Any, scale: Any) -> None:
    """`attnbias.native.pointwise.drop` of one row."""
    u = np.uint32
    first = u(one + u(u(start) * u(0x9E3779B1)))
    for j in range(line.shape[0]):
        x = u(u(u(j) * u(0x9E3779B1)) + first)
        x = u(x ^ u(x >> u(16)))
        x = u(u(x * u(0x7FEB352D)) ^ two)
        x = u(x ^ u(x >> u(15)))
        x = u(x * u(0x846CA68B))
        x = u(x ^ u(x >> u(16)))
        line[j] *= scale if x >= least else np.float32(0)


@inline
def _range(lows: Any, highs: Any, k: int) -> Any:
    """The keys that some row of a group of rows sees."""
    a, z = lows[k * ROWS], highs[k * ROWS]
    for i in range(k * ROWS + 1, (k + 1) * ROWS):
        a, z = min(a, lows[i]), max(z, highs[i])
    return a, z


@inner
def _block(
    b: int,
    h: int,
    begin: int,
    query: Any,
    query_steps: Any,
    panels: Any,
    panel_steps: Any,
    value: Any,
    value_steps: Any,
    more: Any,
    more_steps: Any,
    table: Any,
    table_steps: Any,
    row: Any,
    row_steps: Any,
    dense: Any,
    dense_steps: Any,
    low: Any,
    high: Any,
    edge_step: int,
    one: Any,
    two: Any,
    out: Any,
    out_steps: Any,
    lse: Any,
    lse_steps: Any,
    sizes: Any,
    scale: float,
    limit: int,
    factor: float,
) -> None:
    """The queries of one head from `begin` on."""
    _, heads, share, together, n, m, size, extra, width, written, zero, left = sizes
    wide = size + extra
    ld = TILE + PAD
    times, least, kept = np.float32(scale), np.uint32(limit), np.float32(factor)
    g = h // share
    rows = min(BLOCK, n - begin)
    several = (rows + ROWS - 1) // ROWS
    own = np.zeros(BLOCK * wide, np.float32)
    tile = np.empty(BLOCK * ld, np.float32)
    sums = np.zeros(BLOCK * width, np.float32)
    top = np.full(BLOCK, -np.inf, np.float32)
    total = np.zeros(BLOCK, np.float32)
    lows = np.full(BLOCK, m, np.int64)
    highs = np.zeros(BLOCK, np.int64)
    first, last = m, 0
    for i in range(rows):
        start = b * query_steps[0] + h * query_steps[1] + (begin + i) * query_steps[2]
        into, line = own[i * wide : i * wide + size], query[start : start + size]
        for x in range(size):
            into[x] = line[x] * times
        if extra:
            start = b * more_steps[0] + h * more_steps[1] + (begin + i) * more_steps[2]
            own[i * wide + size : (i + 1) * wide] = more[start : start + extra]
        at = b * edge_step + begin + i
        lows[i], highs[i] = low[at], high[at]
        if high[at] > low[at]:
            first, last = min(first, low[at]), max(last, high[at])
    first = first // PANEL * PANEL
    keys = b * panel_steps[0] + h // together * panel_steps[1]
    values = b * value_steps[0] + g * value_steps[1]
    for c in range(first, last, TILE):
        end = min(c + TILE, (last + PANEL - 1) // PANEL * PANEL)
        for p in range(c, end, PANEL):
            for k in range(several):
                a, z = _range(lows, highs, k)
                if a < p + PANEL and z > p:
                    set_panel(own, k * ROWS * wide, wide, 1, panels, keys + p * wide, PANEL,
                              tile, k * ROWS * ld + p - c, ld, wide)  # fmt: skip
        for k in range(several):
            a, z = _range(lows, highs, k)
            a, z = max(a // PANEL * PANEL, c), min((z + PANEL - 1) // PANEL * PANEL, end)
            for i in range(k * ROWS, (k + 1) * ROWS):
                if z <= a:
                    continue
                line = tile[i * ld + a - c : i * ld + z - c]
                x = min(max(lows[i], a), z)
                y = max(min(highs[i], z), x)
                line[: x - a] = -np.inf
                line[y - a :] = -np.inf
                seen = line[x - a : y - a]
                wideness = y - x
                if len(table):
                    start = b * table_steps[0] + h * table_steps[1] + zero - begin - i + x
                    plus(seen, table[start : start + wideness])
                if len(row):
                    start = b * row_steps[0] + h * row_steps[1] + x
                    plus(seen, row[start : start + wideness])
                if len(dense):
                    start = (b * dense_steps[0] + h * dense_steps[1]
                             + (begin + i) * dense_steps[2] + x - left)  # fmt: skip
                    plus(seen, dense[start : start + wideness])
                best = largest(line)
                before = top[i]
                now = max(before, best)
                if now == -np.inf:
                    line[:] = np.float32(0)
                    continue
                if now > before:
                    top[i] = now
                    fade = exp32(before - now)
                    total[i] *= fade
                    sofar = sums[i * width : (i + 1) * width]
                    for f in range(width):
                        sofar[f] *= fade
                part = np.float32(0)
                for j in range(line.shape[0]):
                    weight = exp32(line[j] - now)
                    line[j] = weight
                    part += weight
                total[i] += part
                if len(one):
                    at = (b * heads + h) * n + begin + i
                    drop_line(line, a, np.uint32(one[at]), np.uint32(two[at]), least, kept)
        for s in range(c, end, DEPTH):
            for k in range(several):
                a, z = _range(lows, highs, k)
                a = max(a // PANEL * PANEL, s)
                z = min(min(z, s + DEPTH), end)
                if z > a:
                    add_product(tile, k * ROWS * ld + a - c, ld, 1, value,
                                values + a * value_steps[2], value_steps[2], sums,
                                k * ROWS * width, width, width, z - a)  # fmt: skip
    for i in range(rows):
        start = b * out_steps[0] + h * out_steps[1] + (begin + i) * out_steps[2]
        into, line = out[start : start + written], sums[i * width : i * width + written]
        at = b * lse_steps[0] + h * lse_steps[1] + (begin + i) * lse_steps[2]
        if total[i] > np.float32(0):
            over = np.float32(1) / total[i]
            for f in range(written):
                into[f] = line[f] * over
            lse[at] = top[i] + np.log(total[i])
        else:
            into[:] = np.float32(0)
            lse[at] = -np.inf


@kernel
def attend(
    query: Any,
    query_steps: Any,
    panels: Any,
    panel_steps: Any,
    value: Any,
    value_steps: Any,
    more: Any,
    more_steps: Any,
    table: Any,
    table_steps: Any,
    row: Any,
    row_steps: Any,
    dense: Any,
    dense_steps: Any,
    low: Any,
    high: Any,
    edge_step: int,
    one: Any,
    two: Any,
    out: Any,
    out_steps: Any,
    lse: Any,
    lse_steps: Any,
    sizes: Any,
    scale: float,
    limit: int,
    factor: float,
) -> None:
    """Output and log-sum-exp.

    sizes: batch, heads, query heads of a head of values, of a head of panels, queries, keys, size,
    columns beside it, value size (a multiple of `LANES`), value size that is written, the entry of
    the table of distance zero for the first query, the key at which `dense` starts.
    """
    batch, heads, n = sizes[0], sizes[1], sizes[4]
    count = (n + BLOCK - 1) // BLOCK
    for place in prange(batch * heads * count):
        # Under a causal mask late blocks are the dear ones: a thread takes one from each end.
        number = place % count
        number = count - 1 - number // 2 if number % 2 else number // 2
        _block(
            place // count // heads,
            place // count % heads,
            number * BLOCK,
            query,
            query_steps,
            panels,
            panel_steps,
            value,
            value_steps,
            more,
            more_steps,
            table,
            table_steps,
            row,
            row_steps,
            dense,
            dense_steps,
            low,
            high,
            edge_step,
            one,
            two,
            out,
            out_steps,
            lse,
            lse_steps,
            sizes,
            scale,
            limit,
            factor,
        )
