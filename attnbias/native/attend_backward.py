"""The backward pass of `attnbias.native.attend`: five products of a tile while it is in the cache.

With ``p = e^(s - lse)`` and ``delta_i = sum_j p_ij dp_ij - dlse_i``: ``ds = p (dp - delta)``, and
from it ``dq = ds k``, ``dk = ds^T q``, ``dv = p^T do`` and sums of ``ds`` for the bias. Scores are
made again. A thread owns the keys it works on; what several of them add to, the gradient of the
queries, has one part for each, so the sums have the same order in every run.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnbias.native.attend import _range, plus
from attnbias.native.jit import exp32, inline, inner, kernel, prange
from attnbias.native.product import PANEL, ROWS, add_product, set_panel

BLOCK = 64  # queries of a block
TILE = 256  # keys of a tile
PAD = 16  # between rows of a tile


@inline
def _slopes(line: Any, step: Any, lse: Any, delta: Any) -> None:
    for j in range(line.shape[0]):
        weight = exp32(line[j] - lse)
        line[j] = weight
        step[j] = weight * (step[j] - delta)


@inline
def _dropped(
    line: Any,
    step: Any,
    lse: Any,
    delta: Any,
    start: int,
    one: Any,
    two: Any,
    least: Any,
    kept: Any,
) -> None:
    """`_slopes` where some weights are dropped (`attnbias.native.attend.drop_line`)."""
    u = np.uint32
    first = u(one + u(u(start) * u(0x9E3779B1)))
    for j in range(line.shape[0]):
        x = u(u(u(j) * u(0x9E3779B1)) + first)
        x = u(x ^ u(x >> u(16)))
        x = u(u(x * u(0x7FEB352D)) ^ two)
        x = u(x ^ u(x >> u(15)))
        x = u(x * u(0x846CA68B))
        x = u(x ^ u(x >> u(16)))
        times = kept if x >= least else np.float32(0)
        weight = exp32(line[j] - lse)
        line[j] = weight * times
        step[j] = weight * (step[j] * times - delta)


@inner
def _chunk(
    chunk: int,
    b_first: int,
    b_last: int,
    h_first: int,
    h_last: int,
    query: Any,
    query_steps: Any,
    panels: Any,
    panel_steps: Any,
    key: Any,
    key_steps: Any,
    value_panels: Any,
    grad: Any,
    grad_steps: Any,
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
    lse: Any,
    delta: Any,
    dq: Any,
    dq_steps: Any,
    dk: Any,
    dv: Any,
    diagonal: Any,
    line_sum: Any,
    scores: Any,
    score_steps: Any,
    sizes: Any,
    scale: float,
    limit: int,
    factor: float,
) -> None:
    """A range of keys for some batch elements and heads."""
    batch, heads, owners, chunks, n, m, size, extra, wide, width, given, zero, left = sizes
    together = heads // owners
    inner = size + extra
    full = (m + PANEL - 1) // PANEL * PANEL
    each = (full // PANEL + chunks - 1) // chunks * PANEL  # keys of a chunk
    times, least, kept = np.float32(scale), np.uint32(limit), np.float32(factor)
    u = np.uint32
    ld = TILE + PAD
    k_first, k_last = chunk * each, min((chunk + 1) * each, full)
    own = np.zeros(BLOCK * wide, np.float32)
    slope = np.zeros(BLOCK * width, np.float32)
    tile = np.zeros(BLOCK * ld, np.float32)
    steps = np.zeros(BLOCK * ld, np.float32)
    sums = np.zeros(BLOCK * wide, np.float32)
    lows = np.full(BLOCK, m, np.int64)
    highs = np.zeros(BLOCK, np.int64)
    for b in range(b_first, b_last):
        for h in range(h_first, h_last):
            owner = h // together
            keys = b * panel_steps[0] + owner * panel_steps[1]
            lines = b * key_steps[0] + owner * key_steps[1]
            values = (b * owners + owner) * full * width
            into_k = (b * owners + owner) * full * wide
            for begin in range(0, n, BLOCK):
                rows = min(BLOCK, n - begin)
                several = (rows + ROWS - 1) // ROWS
                lows[:] = m
                highs[:] = 0
                first, last = full, 0
                if rows < BLOCK:
                    own[:] = np.float32(0)
                    slope[:] = np.float32(0)
                for i in range(rows):
                    at = b * edge_step + begin + i
                    lows[i], highs[i] = max(low[at], k_first), min(high[at], k_last)
                    if highs[i] > lows[i]:
                        first, last = min(first, lows[i]), max(last, highs[i])
                if last <= first:
                    continue
                for i in range(rows):
                    start = (b * query_steps[0] + h * query_steps[1]
                             + (begin + i) * query_steps[2])  # fmt: skip
                    into, line = own[i * wide : i * wide + size], query[start : start + size]
                    for x in range(size):
                        into[x] = line[x] * times
                    if extra:
                        start = (b * more_steps[0] + h * more_steps[1]
                                 + (begin + i) * more_steps[2])  # fmt: skip
                        own[i * wide + size : i * wide + inner] = more[start : start + extra]
                    start = (b * grad_steps[0] + h * grad_steps[1]
                             + (begin + i) * grad_steps[2])  # fmt: skip
                    slope[i * width : i * width + given] = grad[start : start + given]
                sums[:] = np.float32(0)
                first = first // PANEL * PANEL
                for c in range(first, last, TILE):
                    end = min(c + TILE, (last + PANEL - 1) // PANEL * PANEL)
                    for p in range(c, end, PANEL):
                        for k in range(several):
                            a, z = _range(lows, highs, k)
                            at = k * ROWS * ld + p - c
                            if a < p + PANEL and z > p:
                                set_panel(own, k * ROWS * wide, wide, 1, panels,
                                          keys + p * inner, PANEL, tile, at, ld,
                                          inner)  # fmt: skip
                                set_panel(slope, k * ROWS * width, width, 1, value_panels,
                                          values + p * width, PANEL, steps, at, ld,
                                          width)  # fmt: skip
                            else:
                                for r in range(ROWS):
                                    tile[at + r * ld : at + r * ld + PANEL] = np.float32(0)
                                    steps[at + r * ld : at + r * ld + PANEL] = np.float32(0)
                    for k in range(several):
                        a, z = _range(lows, highs, k)
                        a = max(a // PANEL * PANEL, c)
                        z = min((z + PANEL - 1) // PANEL * PANEL, end)
                        for i in range(k * ROWS, (k + 1) * ROWS):
                            if z <= a:
                                continue
                            line = tile[i * ld + a - c : i * ld + z - c]
                            step = steps[i * ld + a - c : i * ld + z - c]
                            x = min(max(lows[i], a), z)
                            y = max(min(highs[i], z), x)
                            at = (b * heads + h) * n + begin + i
                            if y == x or lse[at] == -np.inf:
                                line[:] = np.float32(0)
                                step[:] = np.float32(0)
                                continue
                            line[: x - a] = -np.inf
                            line[y - a :] = -np.inf
                            seen = line[x - a : y - a]
                            far = y - x
                            if len(table):
                                start = (b * table_steps[0] + h * table_steps[1] + zero - begin
                                         - i + x)  # fmt: skip
                                plus(seen, table[start : start + far])
                            if len(row):
                                start = b * row_steps[0] + h * row_steps[1] + x
                                plus(seen, row[start : start + far])
                            if len(dense):
                                start = (b * dense_steps[0] + h * dense_steps[1]
                                         + (begin + i) * dense_steps[2] + x - left)  # fmt: skip
                                plus(seen, dense[start : start + far])
                            if len(one):
                                _dropped(line, step, lse[at], delta[at], a, u(one[at]), u(two[at]),
                                         least, kept)  # fmt: skip
                            else:
                                _slopes(line, step, lse[at], delta[at])
                            seen = step[x - a : y - a]
                            if len(diagonal):
                                start = (((chunk * batch + b) * heads + h) * (n + m - 1) + n - 1
                                         - begin - i + x)  # fmt: skip
                                plus(diagonal[start : start + far], seen)
                            if len(line_sum):
                                start = (b * heads + h) * m + x
                                plus(line_sum[start : start + far], seen)
                            if len(scores):
                                start = (b * score_steps[0] + h * score_steps[1]
                                         + (begin + i) * score_steps[2] + x - left)  # fmt: skip
                                plus(scores[start : start + far], seen)
                    depth = several * ROWS
                    for j in range(c, end, ROWS):
                        add_product(tile, j - c, 1, ld, slope, 0, width, dv,
                                    values + j * width, width, width, depth)  # fmt: skip
                    for j in range(c, end, ROWS):
                        add_product(steps, j - c, 1, ld, own, 0, wide, dk,
                                    into_k + j * wide, wide, wide, depth)  # fmt: skip
                    for k in range(several):
                        a, z = _range(lows, highs, k)
                        a, z = max(a // PANEL * PANEL, c), min(z, end)
                        if z > a:
                            add_product(steps, k * ROWS * ld + a - c, ld, 1, key,
                                        lines + a * key_steps[2], key_steps[2], sums,
                                        k * ROWS * wide, wide, wide, z - a)  # fmt: skip
                for i in range(rows):
                    start = (chunk * dq_steps[0] + b * dq_steps[1] + h * dq_steps[2]
                             + (begin + i) * dq_steps[3])  # fmt: skip
                    line, found = dq[start : start + wide], sums[i * wide : (i + 1) * wide]
                    for x in range(size):
                        line[x] = found[x] * times
                    for x in range(size, inner):
                        line[x] = found[x]


@kernel
def attend_backward(
    query: Any,
    query_steps: Any,
    panels: Any,
    panel_steps: Any,
    key: Any,
    key_steps: Any,
    value_panels: Any,
    grad: Any,
    grad_steps: Any,
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
    lse: Any,
    delta: Any,
    dq: Any,
    dq_steps: Any,
    dk: Any,
    dv: Any,
    diagonal: Any,
    line_sum: Any,
    scores: Any,
    score_steps: Any,
    sizes: Any,
    scale: float,
    limit: int,
    factor: float,
) -> None:
    """Adds to all that it gives.

    sizes: batch, heads, panel heads, chunks of the keys, queries, keys, size, columns beside it,
    columns of queries and keys together (a multiple of `LANES`), value size (the same), value size
    of `grad`, entry of the table of distance zero for the first query, key at which `dense` starts.

    dq ``(chunks, batch, heads, queries, columns)``; dk, dv ``(batch, panel heads, keys up to a
    panel, columns)``; diagonal ``(chunks, batch, heads, queries + keys - 1)``, line_sum ``(batch,
    heads, keys)``; scores as `dense`: where its batch or heads have a step of 0, one thread adds to
    it.
    """
    batch, heads, owners, chunks = sizes[0], sizes[1], sizes[2], sizes[3]
    one_batch = len(scores) > 0 and score_steps[0] == 0 and batch > 1
    one_head = len(scores) > 0 and score_steps[1] == 0 and heads > 1
    outer_batch = 1 if one_batch else batch
    outer_heads = 1 if one_head else owners
    for place in prange(outer_batch * outer_heads * chunks):
        part, chunk = place // chunks, place % chunks
        # Under a causal mask the first keys are the dear ones: a thread takes some from each end.
        chunk = chunks - 1 - chunk // 2 if chunk % 2 else chunk // 2
        b, owner = part // outer_heads, part % outer_heads
        together = heads // owners
        b_last = batch if one_batch else b + 1
        h_first = 0 if one_head else owner * together
        h_last = heads if one_head else (owner + 1) * together
        _chunk(
            chunk,
            b,
            b_last,
            h_first,
            h_last,
            query,
            query_steps,
            panels,
            panel_steps,
            key,
            key_steps,
            value_panels,
            grad,
            grad_steps,
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
            lse,
            delta,
            dq,
            dq_steps,
            dk,
            dv,
            diagonal,
            line_sum,
            scores,
            score_steps,
            sizes,
            scale,
            limit,
            factor,
        )
