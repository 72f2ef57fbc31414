"""The forward kernel: attention of one block of queries over the keys that it sees, one pass.

Per tile of keys: ``s = scale q k^T + u v^T + terms``, hidden outside the band and the ranges, then
the online softmax. Weights are exponentials to the base 2 of scores times log2 e. Tiles that every
row of a block sees whole need no mask and run in a loop of their own, the edges in a second one.

Head sizes that are no power of two are read in two parts (96 is 64 and 32), so that no product is
made of more than a sixteenth of nothing where it can be helped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnbias.kernels.pattern import kept_tile
from attnbias.kernels.places import seen_tile, span, whole_span
from attnbias.kernels.products import add_dot, dot
from attnbias.kernels.terms import add_terms


class Columns(NamedTuple):
    """Factors of a `LowRank`: ``left[b, h, i, r]`` and ``right[b, h, j, r]``, padded with zeros to
    a power of two of columns.
    """

    left: Any
    left_batch: Any
    left_head: Any
    left_row: Any
    right: Any
    right_batch: Any
    right_head: Any
    right_row: Any


@triton.jit
def part(
    base, step, rows, mask, size: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """``base[rows, FROM : FROM + COUNT]``, 0 beyond `size` and, if MASKED, where `mask` is not."""
    d = FROM + tl.arange(0, COUNT)
    at = base + rows[:, None] * step + d[None, :]
    if size < FROM + COUNT:
        if MASKED:
            found = tl.load(at, mask=mask[:, None] & (d < size)[None, :], other=0.0)
        else:
            found = tl.load(at, mask=(d < size)[None, :], other=0.0)
    else:
        if MASKED:
            found = tl.load(at, mask=mask[:, None], other=0.0)
        else:
            found = tl.load(at)
    return found


@triton.jit
def sweep(
    q, q_more, left, top, total, sums, sums_more,
    keys, values, rights, key_step, value_step, right_step,
    start, before, gap, count, b, h, i, im, n, m, scale, unit, terms, places, drop,
    size: tl.constexpr, width: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    FOLDS: tl.constexpr, CHAINS: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """Goes on with the online softmax over `count` tiles of keys from `start`, with a `gap` after
    the first `before` of them. Not MASKED: every entry is seen.

    Scores are in units of `unit` (log2 e, or with it the scale where there is nothing to add). q: a
    tile of queries, or with a CHUNK of features that are multiplied at a time pointers to it.
    """
    for t in range(count):
        at = start + t * COLS
        if MASKED:
            at += tl.where(t >= before, gap, 0)
        c = tl.arange(0, COLS)
        j = at + c
        jm = j < m
        if not MASKED:
            jm = tl.full((COLS,), True, tl.int1)
        # Rows of a tile are counted from its own start: 32 bits hold them whatever the tensor.
        tile_keys = keys + at.to(tl.int64) * key_step
        if CHUNK > 0:
            s = tl.zeros((ROWS, COLS), tl.float32)
            d = tl.arange(0, CHUNK)
            for ahead in range(0, size, CHUNK):
                some = (ahead + d < size)[None, :]
                x = tl.load(q + ahead + d[None, :], mask=im[:, None] & some, other=0.0)
                y = tile_keys + c[:, None] * key_step + (ahead + d)[None, :]
                y = tl.load(y, mask=jm[:, None] & some, other=0.0)
                s = add_dot(s, x, tl.trans(y), PRECISION)
        else:
            k = part(tile_keys, key_step, c, jm, size, 0, SIZE, MASKED)
            s = dot(q, tl.trans(k), PRECISION)
            if SIZE_MORE > 0:
                k_more = part(tile_keys, key_step, c, jm, size, SIZE, SIZE_MORE, MASKED)
                s = add_dot(s, q_more, tl.trans(k_more), PRECISION)
        if CHAINS:
            right = part(
                rights + at.to(tl.int64) * right_step, right_step, c, jm, RANK, 0, RANK, MASKED
            )
            s = add_dot(s, left, tl.trans(right), PRECISION)
        if not FOLDS:
            s = s * scale
        if RANK > 0 and not CHAINS:
            right = part(
                rights + at.to(tl.int64) * right_step, right_step, c, jm, RANK, 0, RANK, MASKED
            )
            s += dot(left, tl.trans(right), PRECISION)
        s = add_terms(s, terms, KINDS, b, h, i, j, im, jm, n)
        if MASKED:
            s = tl.where(seen_tile(places, b, i, j, im, jm, BAND, RANGES), s, float("-inf"))
        grown = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet: minus infinity less itself would be NaN.
        safe = tl.where(grown == float("-inf"), 0.0, grown) * unit
        fade = tl.exp2(top * unit - safe)
        p = tl.exp2(s * unit - safe[:, None])
        total = total * fade + tl.sum(p, 1)
        if DROPS:
            p = tl.where(kept_tile(drop, b, h, i, j), p * drop.factor, 0.0)
        tile_values = values + at.to(tl.int64) * value_step
        v = part(tile_values, value_step, c, jm, width, 0, WIDTH, MASKED)
        p = p.to(v.dtype)
        sums = add_dot(sums * fade[:, None], p, v, PRECISION)
        if WIDTH_MORE > 0:
            v_more = part(tile_values, value_step, c, jm, width, WIDTH, WIDTH_MORE, MASKED)
            sums_more = add_dot(sums_more * fade[:, None], p, v_more, PRECISION)
        top = grown
    return top, total, sums, sums_more


@triton.jit
def edges(first, last, whole_first, whole_last, COLS: tl.constexpr):
    """Tiles of ``first <= j < last``: the first start, tiles before the whole ones, whole ones,
    tiles after them.
    """
    start = first // COLS * COLS
    end = tl.where(last > first, (last + COLS - 1) // COLS * COLS, start)
    one = tl.minimum(tl.maximum((whole_first + COLS - 1) // COLS * COLS, start), end)
    two = tl.minimum(tl.maximum(whole_last // COLS * COLS, one), end)
    return start, (one - start) // COLS, (two - one) // COLS, (end - two) // COLS


@triton.jit
def forward(
    query, key, value, out, lse,
    query_steps, key_steps, value_steps, out_steps,
    batch, heads, share, n, m, scale, unit,
    columns, terms, places, drop,
    size: tl.constexpr, width: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    FOLDS: tl.constexpr, CHAINS: tl.constexpr, BATCH_FAST: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head.

    query ``(b, h, i, size)``, key ``(b, h // share, j, size)``, value ``(.., width)``; *_steps:
    (batch, head, row), the last dimension is contiguous. out like query, lse ``(b, h, n)``
    contiguous. columns: `Columns` or None; RANK its columns or 0. places: `Places`; drop: `Drop` or
    None. SIZE and SIZE_MORE, powers of two (or 0), hold size together; so do WIDTH and WIDTH_MORE.
    unit: see `sweep`. FOLDS: scores are not scaled, the unit is. CHAINS: the columns are added to
    the product of queries and keys before it is scaled, the left ones divided by the scale here.
    BATCH_FAST: programs of all batch elements of a head, which read the same entries of a matrix,
    follow one another.
    """
    blocks = tl.cdiv(n, ROWS)
    unit_of = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    if BAND >= 2:
        block = blocks - 1 - block  # under a causal mask the last ones take longest
    if BATCH_FAST:
        b = (unit_of % batch).to(tl.int64)
        h = (unit_of // batch).to(tl.int64)
    else:
        b = (unit_of // heads).to(tl.int64)
        h = (unit_of % heads).to(tl.int64)
    r = tl.arange(0, ROWS)
    i = block * ROWS + r
    im = i < n
    above = (block * ROWS).to(tl.int64)
    queries = query + b * query_steps[0] + h * query_steps[1] + above * query_steps[2]
    q = queries + r[:, None] * query_steps[2]
    if CHUNK == 0:
        q = part(queries, query_steps[2], r, im, size, 0, SIZE, True)
    q_more = q
    if SIZE_MORE > 0 and CHUNK == 0:
        q_more = part(queries, query_steps[2], r, im, size, SIZE, SIZE_MORE, True)
    keys = key + b * key_steps[0] + h // share * key_steps[1]
    values = value + b * value_steps[0] + h // share * value_steps[1]
    left = q
    rights = keys
    right_step = 0
    if RANK > 0:
        lefts = columns.left + b * columns.left_batch + h * columns.left_head
        lefts += above * columns.left_row
        left = part(lefts, columns.left_row, r, im, RANK, 0, RANK, True)
        if CHAINS:
            left = (left.to(tl.float32) / scale).to(left.dtype)
        rights = columns.right + b * columns.right_batch + h * columns.right_head
        right_step = columns.right_row
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    sums_more = total
    if WIDTH_MORE > 0:
        sums_more = tl.zeros((ROWS, WIDTH_MORE), tl.float32)
    first, last = span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
    inner, ended = whole_span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
    start, before, whole, after = edges(first, last, inner, ended, COLS)
    top, total, sums, sums_more = sweep(
        q, q_more, left, top, total, sums, sums_more,
        keys, values, rights, key_steps[2], value_steps[2], right_step,
        start + before * COLS, whole, 0, whole, b, h, i, im, n, m, scale, unit,
        terms, places, drop,
        size, width, KINDS, RANK, BAND, RANGES, DROPS, PRECISION, FOLDS, CHAINS, False, CHUNK,
        ROWS, COLS, SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
    )  # fmt: skip
    top, total, sums, sums_more = sweep(
        q, q_more, left, top, total, sums, sums_more,
        keys, values, rights, key_steps[2], value_steps[2], right_step,
        start, before, whole * COLS, before + after, b, h, i, im, n, m, scale, unit,
        terms, places, drop,
        size, width, KINDS, RANK, BAND, RANGES, DROPS, PRECISION, FOLDS, CHAINS, True, CHUNK,
        ROWS, COLS, SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
    )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    outs = out + b * out_steps[0] + h * out_steps[1] + above * out_steps[2]
    store(outs, out_steps[2], r, im, sums / safe[:, None], width, 0, WIDTH)
    if WIDTH_MORE > 0:
        store(outs, out_steps[2], r, im, sums_more / safe[:, None], width, WIDTH, WIDTH_MORE)
    if FOLDS:
        top *= scale
    logs = tl.where(total == 0.0, float("-inf"), top + tl.log(safe))
    tl.store(lse + (b * heads + h) * n + i, logs, mask=im)


@triton.jit
def store(
    base, step, rows, mask, made, width: tl.constexpr, FROM: tl.constexpr, COUNT: tl.constexpr
):
    """``base[rows, FROM : FROM + COUNT] = made`` where `mask` is, up to `width`."""
    f = FROM + tl.arange(0, COUNT)
    tl.store(
        base + rows[:, None] * step + f[None, :],
        made.to(base.dtype.element_ty),
        mask=mask[:, None] & (f < width)[None, :],
    )
