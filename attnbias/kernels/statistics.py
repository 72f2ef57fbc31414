"""Statistics of the attention map without the map: all that is asked for in one pass over tiles.

After the log-sum-exp, a program owns blocks of queries of one head and goes over the keys that they
see, as the forward does: scores, weights ``p = exp(s - lse)``, and what each row and column of the
tile adds up to. Sums along a row stay on chip. Sums along a column go to lines of the program's
own, which one sum over the programs in a fixed order joins afterwards: no atomics, and two runs
agree bit for bit. Long sums carry what rounding took from them (Kahan 1965).

Scores are made as ``k q^T``, so that the threads of a warp share a query and the sum of a column is
nearly a thread's own. Of the sums along rows a thread keeps its part (`folded`) and does not meet
the others before the end of a lot of tiles.

`normalise` finds the log-sum-exp alone, where nothing else has: scores, and no values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnbias.kernels.backward import chunks
from attnbias.kernels.forward import edges, part
from attnbias.kernels.places import seen_tile, span, whole_span
from attnbias.kernels.products import add_dot, dot
from attnbias.kernels.terms import add_terms

LOG2E = tl.constexpr(1.4426950408889634)
# A weight below e^-100 is no number of float32, and its logarithm must not meet it as infinity.
FAINT = tl.constexpr(100.0)
FAR = tl.constexpr(2147483647)
LOT = tl.constexpr(32)  # tiles whose sums are not yet joined


MEANS = (2, 6, 1, 5)


class Sums(NamedTuple):
    """Where the sums go; None for what is not asked for.

    received: ``(units, parts, 2, keys)``, a line and its rounding for each program. rows: ``(units,
    queries, 2, 8)``, at 0 the entropy of a row, at 4 its mean distance, at `MEANS` those of its
    features, and the rounding of each. Both start at 0. surprise, place: ``(units, queries, TOP)``,
    the smallest ``lse - s`` of a row in no order, and their keys (negative: none).
    """

    received: Any
    rows: Any
    surprise: Any
    place: Any


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
    queries, query_row, q, q_more, left, keys, key_row, rights, right_row, scale, terms,
    b, h, i, im, begin, j, jm, n,
    size: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr,
):  # fmt: skip
    """Scores of a tile ``(rows, keys)`` in float32, with everything that is added to them.

    With a CHUNK, that many features of queries and keys are multiplied at a time, and q is not
    looked at.
    """
    # Keys of a tile are counted from its own start: 32 bits hold them whatever the tensor.
    c = tl.arange(0, COLS)
    keys += begin.to(tl.int64) * key_row
    if CHUNK > 0:
        x, y = keys + c[:, None] * key_row, i.to(tl.int64)
        s = chunks(x, jm, queries, query_row, y, im, size, COLS, ROWS, CHUNK, PRECISION)
    else:
        k = part(keys, key_row, c, jm, size, 0, SIZE, MASKED)
        s = dot(k, tl.trans(q), PRECISION)
        if SIZE_MORE > 0:
            k_more = part(keys, key_row, c, jm, size, SIZE, SIZE_MORE, MASKED)
            s = add_dot(s, k_more, tl.trans(q_more), PRECISION)
    s *= scale
    if RANK > 0:
        rights += begin.to(tl.int64) * right_row
        right = part(rights, right_row, c, jm, RANK, 0, RANK, MASKED)
        s += dot(right, tl.trans(left), PRECISION)
    return add_terms(tl.trans(s), terms, KINDS, b, h, i, j, im, jm, n)


@triton.jit
def lined(x, ROWS: tl.constexpr, COLS: tl.constexpr, LINES: tl.constexpr):
    """A tile with its keys taken apart as the threads hold them: of a key's number the bits of the
    warp and of the eight threads of a column make one of LINES lines, the others a thread's own.
    """
    return tl.reshape(x, (ROWS, COLS // (2 * LINES), LINES // 8, 2, 8))


@triton.jit
def folded(x, ROWS: tl.constexpr, COLS: tl.constexpr, LINES: tl.constexpr):
    """``(rows, keys)`` summed to ``(rows, LINES)``: what a thread holds, on no other's account."""
    x = tl.sum(tl.sum(lined(x, ROWS, COLS, LINES), 3), 1)
    return tl.reshape(x, (ROWS, LINES))


@triton.jit
def nearer(x, i, y, j):
    """The smaller number and its place, of equal ones the first."""
    own = (x < y) | ((x == y) & (i < j))
    return tl.where(own, x, y), tl.where(own, i, j)


@triton.jit
def folded_least(x, j, ROWS: tl.constexpr, COLS: tl.constexpr, LINES: tl.constexpr):
    """The smallest entry of every line, ``(rows, LINES)``, and its key."""
    at = tl.broadcast_to(j[None, :], (ROWS, COLS))
    x, at = lined(x, ROWS, COLS, LINES), lined(at, ROWS, COLS, LINES)
    x, at = tl.reduce((x, at), 3, nearer)
    x, at = tl.reduce((x, at), 1, nearer)
    return tl.reshape(x, (ROWS, LINES)), tl.reshape(at, (ROWS, LINES))


@triton.jit
def weighed(p, values, j, jm, k: tl.constexpr, FEATURES: tl.constexpr):
    """Weights times feature k of their keys."""
    return p * tl.load(values + j * FEATURES + k, mask=jm, other=0.0)[None, :]


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
    CHUNK: tl.constexpr, SIZE: tl.constexpr, SIZE_MORE: tl.constexpr,
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
    q = im
    if CHUNK == 0:
        q = part(queries, query_steps[2], row, im, size, 0, SIZE, True)
    q_more = q
    if SIZE_MORE > 0 and CHUNK == 0:
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
            begin = start + t * COLS
            j = begin + tl.arange(0, COLS)
            jm = j < m if phase != 1 else tl.full((COLS,), True, tl.int1)
            s = tile_scores(
                queries, query_steps[2], q, q_more, left, keys, key_steps[2], rights, right_row,
                scale, terms, b, h, i, im, begin, j, jm, n,
                size, KINDS, RANK, PRECISION, phase != 1, CHUNK, ROWS, COLS, SIZE, SIZE_MORE,
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
    CHUNK: tl.constexpr, SIZE: tl.constexpr, SIZE_MORE: tl.constexpr,
    RECEIVED: tl.constexpr, INNER: tl.constexpr, GAP: tl.constexpr, TOP: tl.constexpr,
    FEATURES: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """One program: every `parts`-th block of ROWS queries of one head, back and forth, so that
    under a causal mask all programs have as much to do.

    query ``(b, h, i, size)``, key ``(b, h // share, j, size)``; *_steps: (batch, head, row), the
    last dimension is contiguous. lse ``(b, h, n)`` contiguous, plus infinity for a query that does
    not count. columns, terms, places: see `forward`. along: `Along`; sums: `Sums`. RECEIVED, INNER,
    GAP: whether they are wanted; TOP: how many keys, a power of two, or 0; FEATURES: how many, 0 to
    4. LINES: see `lined`, 8 for each warp.
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
        q = im
        if CHUNK == 0:
            q = part(queries, query_steps[2], row, im, size, 0, SIZE, True)
        q_more = q
        if SIZE_MORE > 0 and CHUNK == 0:
            q_more = part(queries, query_steps[2], row, im, size, SIZE, SIZE_MORE, True)
        left = q
        if RANK > 0:
            lefts = columns.left + b * columns.left_batch + h * columns.left_head
            left = part(lefts, columns.left_row, row, im, RANK, 0, RANK, True)
        logs = tl.load(lse + line, mask=im, other=float("inf"))
        here = tl.load(along.query + b * along.query_batch + i, mask=im, other=0.0) if GAP else logs
        if TOP == 1:
            # Of a row that does not count every ``lse - s`` is infinite, and none is smaller.
            least = tl.full((ROWS, LINES), float("inf"), tl.float32)
            place = tl.full((ROWS, LINES), -1, tl.int32)
        elif TOP > 1:
            least = tl.full((ROWS,), float("inf"), tl.float32)
            best = tl.full((ROWS, TOP), float("inf"), tl.float32)
            place = tl.broadcast_to(-1 - tl.arange(0, TOP)[None, :], (ROWS, TOP))
        first, last = span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
        last = tl.where(block < blocks, last, first)
        inside, outside = whole_span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
        start, before, whole, after = edges(first, last, inside, outside, COLS)
        if RECEIVED:
            # Lines that other threads wrote in the turn before are read in this one.
            tl.debug_barrier()
        for phase in tl.static_range(0 if BAND % 2 == 1 or RANGES else 1, 3):
            count = whole if phase == 1 else (before if phase == 0 else after)
            for lot in range(tl.cdiv(count, LOT)):
                zero = tl.zeros((ROWS, LINES), tl.float32)
                inner_lot, gap_lot, lot_0, lot_1, lot_2, lot_3 = zero, zero, zero, zero, zero, zero
                for t in range(lot * LOT, tl.minimum((lot + 1) * LOT, count)):
                    begin = start + t * COLS
                    j = begin + tl.arange(0, COLS)
                    jm = j < m if phase != 1 else tl.full((COLS,), True, tl.int1)
                    if RECEIVED:
                        mine = sums.received + tl.program_id(0).to(tl.int64) * 2 * m + j
                        column = tl.load(mine, mask=jm, other=0.0)
                        column_rest = tl.load(mine + m, mask=jm, other=0.0)
                    x = logs[:, None] - tile_scores(
                        queries, query_steps[2], q, q_more, left, keys, key_steps[2], rights,
                        right_row, scale, terms, b, h, i, im, begin, j, jm, n, size,
                        KINDS, RANK, PRECISION, phase != 1, CHUNK, ROWS, COLS, SIZE, SIZE_MORE,
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
                        inner_lot += folded(p * tl.minimum(x, FAINT), ROWS, COLS, LINES)
                    if GAP:
                        there = tl.load(along.key + b * along.key_batch + j, mask=jm, other=0.0)
                        far = tl.abs(here[:, None] - there[None, :])
                        gap_lot += folded(p * far, ROWS, COLS, LINES)
                    values = along.value
                    if FEATURES > 0:
                        values += b * along.value_batch
                        lot_0 += folded(weighed(p, values, j, jm, 0, FEATURES), ROWS, COLS, LINES)
                    if FEATURES > 1:
                        lot_1 += folded(weighed(p, values, j, jm, 1, FEATURES), ROWS, COLS, LINES)
                    if FEATURES > 2:
                        lot_2 += folded(weighed(p, values, j, jm, 2, FEATURES), ROWS, COLS, LINES)
                    if FEATURES > 3:
                        lot_3 += folded(weighed(p, values, j, jm, 3, FEATURES), ROWS, COLS, LINES)
                    if TOP == 1:
                        # Keys come in their order: of equal weights the one there stays.
                        peak, at = folded_least(x, j, ROWS, COLS, LINES)
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
                if INNER or GAP or FEATURES > 0:
                    # Of these sums a thread would hold every row: they wait in memory.
                    tl.debug_barrier()
                    pairs = tl.join(tl.sum(inner_lot, 1), tl.sum(gap_lot, 1))
                    means = tl.join(tl.sum(lot_0, 1), tl.sum(lot_1, 1))
                    others = tl.join(tl.sum(lot_2, 1), tl.sum(lot_3, 1))
                    more = tl.join(tl.join(pairs, means), tl.join(others, others))
                    wait = sums.rows + line[:, None] * 16 + tl.arange(0, 8)[None, :]
                    total = tl.load(wait, mask=im[:, None], other=0.0)
                    rest = tl.load(wait + 8, mask=im[:, None], other=0.0)
                    total, rest = joined(total, rest, tl.reshape(more, (ROWS, 8)))
                    tl.store(wait, total, mask=im[:, None])
                    tl.store(wait + 8, rest, mask=im[:, None])
            start += count * COLS
        if TOP == 1:
            least, place = tl.reduce((least, place), 1, nearer)
            tl.store(sums.surprise + line, least, mask=im)
            tl.store(sums.place + line, place, mask=im)
        elif TOP > 1:
            t = line[:, None] * TOP + tl.arange(0, TOP)[None, :]
            tl.store(sums.surprise + t, best, mask=im[:, None])
            tl.store(sums.place + t, place, mask=im[:, None])
