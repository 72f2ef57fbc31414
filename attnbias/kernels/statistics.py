"""Statistics of the attention map without the map: all that is asked for in one pass over tiles.

After the log-sum-exp, a program owns blocks of queries of one head and goes over the keys that they
see, as the forward does: scores, weights ``p = exp(s - lse)``, and what each row and column of the
tile adds up to. Sums along a row stay on chip. Sums along a column go to lines of the program's
own, which one sum over the programs in a fixed order joins afterwards: no atomics, and two runs
agree bit for bit. Long sums carry what rounding took from them (Kahan 1965).

`normalise` finds the log-sum-exp alone, where nothing else has: scores, and no values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnbias.kernels.forward import edges, part
from attnbias.kernels.places import seen_tile, span, whole_span
from attnbias.kernels.products import add_dot, dot
from attnbias.kernels.terms import add_terms

LOG2E = tl.constexpr(1.4426950408889634)
# A weight below e^-100 is no number of float32, and its logarithm must not meet it as infinity.
FAINT = tl.constexpr(100.0)
FAR = tl.constexpr(2147483647)


class Sums(NamedTuple):
    """Where the sums go; None for what is not asked for.

    received: ``(units, parts, 2, keys)``, a line and its rounding for each program. inner, gap:
    ``(units, queries)``. surprise, place: ``(units, queries, TOP)``, the smallest ``lse - s`` of a
    row in no order, and their keys (negative: none). means: ``(units, queries, FEATURES)``.
    """

    received: Any
    inner: Any
    gap: Any
    surprise: Any
    place: Any
    means: Any


class Along(NamedTuple):
    """What the sums weigh keys with: positions ``query[b, i]`` and ``key[b, j]`` in float32, and
    features ``value[b, j, FEATURES]``; the steps are those of the batch.
    """

    query: Any
    query_batch: Any
    key: Any
    key_batch: Any
    value: Any
    value_batch: Any


@triton.jit
def tile_scores(
    q, q_more, left, keys, key_row, rights, right_row, scale, terms, b, h, i, j, im, jm, n,
    size: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile ``(rows, keys)`` in float32, with everything that is added to them."""
    at = j.to(tl.int64)
    k = part(keys, key_row, at, jm, size, 0, SIZE, True)
    s = dot(q, tl.trans(k), PRECISION)
    if SIZE_MORE > 0:
        k_more = part(keys, key_row, at, jm, size, SIZE, SIZE_MORE, True)
        s = add_dot(s, q_more, tl.trans(k_more), PRECISION)
    s *= scale
    if RANK > 0:
        right = part(rights, right_row, at, jm, RANK, 0, RANK, True)
        s += dot(left, tl.trans(right), PRECISION)
    return add_terms(s, terms, KINDS, b, h, i, j, im, jm, n)


@triton.jit
def joined(total, rest, more):
    """A long sum goes on: `rest` is what rounding has added to `total` too much."""
    step = more - rest
    grown = total + step
    return grown, (grown - total) - step


@triton.jit
def normalise(
    query, key, lse, query_steps, key_steps, heads, share, n, m, scale, columns, terms, places,
    size: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, BAND: tl.constexpr,
    RANGES: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr,
):  # fmt: skip
    """One program: ``lse[b, h, i] = log sum_j exp(s_ij)`` of ROWS queries; arguments as below."""
    blocks = tl.cdiv(n, ROWS)
    unit = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    b = (unit // heads).to(tl.int64)
    h = (unit % heads).to(tl.int64)
    i = block * ROWS + tl.arange(0, ROWS)
    im = i < n
    row = i.to(tl.int64)
    queries = query + b * query_steps[0] + h * query_steps[1]
    q = part(queries, query_steps[2], row, im, size, 0, SIZE, True)
    q_more = q
    if SIZE_MORE > 0:
        q_more = part(queries, query_steps[2], row, im, size, SIZE, SIZE_MORE, True)
    keys = key + b * key_steps[0] + (h // share) * key_steps[1]
    left = q
    rights = keys
    right_row = key_steps[2]
    if RANK > 0:
        lefts = columns.left + b * columns.left_batch + h * columns.left_head
        left = part(lefts, columns.left_row, row, im, RANK, 0, RANK, True)
        rights = columns.right + b * columns.right_batch + h * columns.right_head
        right_row = columns.right_row
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    rest = tl.zeros((ROWS,), tl.float32)
    first, last = span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
    inside, outside = whole_span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
    start, before, whole, after = edges(first, last, inside, outside, COLS)
    for phase in tl.static_range(0 if BAND % 2 == 1 or RANGES else 1, 3):
        count = whole if phase == 1 else (before if phase == 0 else after)
        for t in range(count):
            j = start + t * COLS + tl.arange(0, COLS)
            jm = j < m
            s = tile_scores(
                q, q_more, left, keys, key_steps[2], rights, right_row, scale, terms,
                b, h, i, j, im, jm, n, size, KINDS, RANK, PRECISION, SIZE, SIZE_MORE,
            )  # fmt: skip
            if phase != 1:
                seen = seen_tile(places, b, i, j, im, jm, BAND, RANGES)
                s = tl.where(seen, s, float("-inf"))
            grown = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(grown == float("-inf"), 0.0, grown)
            fade = tl.exp2((top - safe) * LOG2E)
            p = tl.exp2((s - safe[:, None]) * LOG2E)
            total, rest = joined(total * fade, rest * fade, tl.sum(p, 1))
            top = grown
        start += count * COLS
    safe_total = tl.where(total == 0.0, 1.0, total)
    logs = tl.where(total == 0.0, float("-inf"), top + tl.log(safe_total))
    tl.store(lse + unit.to(tl.int64) * n + i, logs, mask=im)


@triton.jit
def statistics(
    query, key, lse, query_steps, key_steps, heads, share, n, m, scale, columns, terms, places,
    parts, along, sums,
    size: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, BAND: tl.constexpr,
    RANGES: tl.constexpr, PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr,
    RECEIVED: tl.constexpr, INNER: tl.constexpr, GAP: tl.constexpr, TOP: tl.constexpr,
    FEATURES: tl.constexpr,
):  # fmt: skip
    """One program: every `parts`-th block of ROWS queries of one head, back and forth, so that
    under a causal mask all programs have as much to do.

    query ``(b, h, i, size)``, key ``(b, h // share, j, size)``; *_steps: (batch, head, row), the
    last dimension is contiguous. lse ``(b, h, n)`` contiguous, plus infinity for a query that does
    not count. columns, terms, places: see `forward`. along: `Along`; sums: `Sums`. RECEIVED, INNER,
    GAP: whether they are wanted; TOP: how many keys, a power of two, or 0; FEATURES: how many, a
    power of two of 16 or more, or 0.
    """
    unit = tl.program_id(0) // parts
    own = tl.program_id(0) % parts
    b = (unit // heads).to(tl.int64)
    h = (unit % heads).to(tl.int64)
    blocks = tl.cdiv(n, ROWS)
    queries = query + b * query_steps[0] + h * query_steps[1]
    keys = key + b * key_steps[0] + (h // share) * key_steps[1]
    rights = keys
    right_row = key_steps[2]
    if RANK > 0:
        rights = columns.right + b * columns.right_batch + h * columns.right_head
        right_row = columns.right_row
    for turn in range(tl.cdiv(blocks, parts)):
        block = turn * parts + tl.where(turn % 2 == 0, own, parts - 1 - own)
        i = block * ROWS + tl.arange(0, ROWS)
        im = i < n
        line = unit.to(tl.int64) * n + i  # of a row in everything that is contiguous
        row = i.to(tl.int64)
        q = part(queries, query_steps[2], row, im, size, 0, SIZE, True)
        q_more = q
        if SIZE_MORE > 0:
            q_more = part(queries, query_steps[2], row, im, size, SIZE, SIZE_MORE, True)
        left = q
        if RANK > 0:
            lefts = columns.left + b * columns.left_batch + h * columns.left_head
            left = part(lefts, columns.left_row, row, im, RANK, 0, RANK, True)
        logs = tl.load(lse + line, mask=im, other=float("inf"))
        here = tl.load(along.query + b * along.query_batch + i, mask=im, other=0.0) if GAP else logs
        inner = tl.zeros((ROWS,), tl.float32)
        inner_rest = tl.zeros((ROWS,), tl.float32)
        gap = tl.zeros((ROWS,), tl.float32)
        gap_rest = tl.zeros((ROWS,), tl.float32)
        if TOP > 0:
            # Of a row that does not count every ``lse - s`` is infinite, and none is smaller.
            least = tl.full((ROWS,), float("inf"), tl.float32)
        if TOP == 1:
            place = tl.full((ROWS,), -1, tl.int32)
        elif TOP > 1:
            best = tl.broadcast_to(least[:, None], (ROWS, TOP))
            place = tl.broadcast_to(-1 - tl.arange(0, TOP)[None, :], (ROWS, TOP))
        if FEATURES > 0:
            means = tl.zeros((ROWS, FEATURES), tl.float32)
            means_rest = tl.zeros((ROWS, FEATURES), tl.float32)
        first, last = span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
        last = tl.where(block < blocks, last, first)
        inside, outside = whole_span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
        start, before, whole, after = edges(first, last, inside, outside, COLS)
        if RECEIVED:
            # Lines that other threads wrote in the turn before are read in this one.
            tl.debug_barrier()
        for phase in tl.static_range(0 if BAND % 2 == 1 or RANGES else 1, 3):
            count = whole if phase == 1 else (before if phase == 0 else after)
            for t in range(count):
                j = start + t * COLS + tl.arange(0, COLS)
                jm = j < m
                if RECEIVED:
                    mine = sums.received + tl.program_id(0).to(tl.int64) * 2 * m + j
                    column = tl.load(mine, mask=jm, other=0.0)
                    column_rest = tl.load(mine + m, mask=jm, other=0.0)
                x = logs[:, None] - tile_scores(
                    q, q_more, left, keys, key_steps[2], rights, right_row, scale, terms,
                    b, h, i, j, im, jm, n, size, KINDS, RANK, PRECISION, SIZE, SIZE_MORE,
                )  # fmt: skip
                if phase != 1:
                    seen = seen_tile(places, b, i, j, im, jm, BAND, RANGES)
                    x = tl.where(seen, x, float("inf"))
                p = tl.exp2(x * -LOG2E)
                if RECEIVED:
                    column, column_rest = joined(column, column_rest, tl.sum(p, 0))
                    tl.store(mine, column, mask=jm)
                    tl.store(mine + m, column_rest, mask=jm)
                if INNER:
                    more = tl.sum(p * tl.minimum(x, FAINT), 1)
                    inner, inner_rest = joined(inner, inner_rest, more)
                if GAP:
                    there = tl.load(along.key + b * along.key_batch + j, mask=jm, other=0.0)
                    more = tl.sum(p * tl.abs(here[:, None] - there[None, :]), 1)
                    gap, gap_rest = joined(gap, gap_rest, more)
                if FEATURES > 0:
                    values = along.value + b * along.value_batch
                    value = part(values, FEATURES, j, jm, FEATURES, 0, FEATURES, True)
                    # Not into an accumulator of the tensor cores, which cut digits off.
                    means, means_rest = joined(means, means_rest, dot(p, value, PRECISION))
                if TOP == 1:
                    peak = tl.min(x, 1)
                    at = tl.min(tl.where(x == peak[:, None], j[None, :], FAR), 1)
                    place = tl.where(peak < least, at, place)
                    least = tl.minimum(least, peak)
                elif TOP > 1:
                    peak = tl.min(x, 1)
                    while tl.max((peak < least).to(tl.int32), 0) > 0:
                        at = tl.min(tl.where(x == peak[:, None], j[None, :], FAR), 1)
                        # It takes the place of the smallest; of equal ones the first key stays.
                        worst = tl.max(tl.where(best == least[:, None], place, -FAR), 1)
                        taken = (place == worst[:, None]) & (peak < least)[:, None]
                        best = tl.where(taken, peak[:, None], best)
                        place = tl.where(taken, at[:, None], place)
                        x = tl.where(j[None, :] == at[:, None], float("inf"), x)
                        least = tl.max(best, 1)
                        peak = tl.min(x, 1)
            start += count * COLS
        if INNER:
            tl.store(sums.inner + line, inner - inner_rest, mask=im)
        if GAP:
            tl.store(sums.gap + line, gap - gap_rest, mask=im)
        if TOP == 1:
            tl.store(sums.surprise + line, least, mask=im)
            tl.store(sums.place + line, place, mask=im)
        elif TOP > 1:
            t = line[:, None] * TOP + tl.arange(0, TOP)[None, :]
            tl.store(sums.surprise + t, best, mask=im[:, None])
            tl.store(sums.place + t, place, mask=im[:, None])
        if FEATURES > 0:
            f = line[:, None] * FEATURES + tl.arange(0, FEATURES)[None, :]
            tl.store(sums.means + f, means - means_rest, mask=im[:, None])
