"""Gradients of queries, and sums over keys and diagonals: see `attnbias.kernels.backward`."""

from __future__ import annotations

import triton
import triton.language as tl

from attnbias.kernels.backward import (
    add_fine,
    add_line,
    chunks,
    diagonal_sums,
    product,
    row_values,
    weights,
)
from attnbias.kernels.forward import edges, part, store
from attnbias.kernels.pattern import kept_tile
from attnbias.kernels.places import span, whole_span
from attnbias.kernels.points_gradients import add_rows, start_rows, store_rows
from attnbias.kernels.products import add_dot, dot


@triton.jit
def queries_sweep(
    sums, q, q_more, do, do_more, logs, less, left,
    keys, values, rights, factors, key_step, value_step, right_step, factor_step,
    start, before, gap, count, b, h, i, im, n, m, scale, unit, terms, places, drop, line, line_at,
    size: tl.constexpr, width: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    FACTORS: tl.constexpr, BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr,
    QUERY: tl.constexpr, LINE: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr, FOLDS: tl.constexpr,
    CHUNK: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """Adds to `sums` what `count` tiles of keys bring, from `start`, with a `gap` after the first
    `before` of them. Not MASKED: every entry is seen. line_at: of the tile at key 0, where the
    main diagonal of the tile is in the line. q, do: tiles, or with a CHUNK of features that are
    multiplied at a time pointers to them.
    """
    dq, dq_more, left_sums, points, ahead, behind = sums
    for t in range(count):
        at = start + t * COLS
        if MASKED:
            at += tl.where(t >= before, gap, 0)
        c = tl.arange(0, COLS)
        j = at + c
        jm = j < m
        if not MASKED:
            jm = tl.full((COLS,), True, tl.int1)
        from_key = at.to(tl.int64)
        tile = keys + from_key * key_step
        k = part(tile, key_step, c, jm, size, 0, SIZE, MASKED)
        k_more = k
        if SIZE_MORE > 0:
            k_more = part(tile, key_step, c, jm, size, SIZE, SIZE_MORE, MASKED)
        if CHUNK > 0:
            tile = keys + from_key * key_step
            s = chunks(q, im, tile, key_step, c, jm, size, ROWS, COLS, CHUNK, PRECISION)
        else:
            s = product(q, q_more, k, k_more, SIZE_MORE, PRECISION)
        if not FOLDS:
            s = s * scale
        if RANK > 0:
            right = part(rights + from_key * right_step, right_step, c, jm, RANK, 0, RANK, MASKED)
            s += dot(left, tl.trans(right), PRECISION)
        p = weights(
            s, unit, logs, terms, places, b, h, i, j, im, jm, n, KINDS, BAND, RANGES, MASKED
        )
        tile = values + from_key * value_step
        if CHUNK > 0:
            dp = chunks(do, im, tile, value_step, c, jm, width, ROWS, COLS, CHUNK, PRECISION)
        else:
            v = part(tile, value_step, c, jm, width, 0, WIDTH, MASKED)
            v_more = v
            if WIDTH_MORE > 0:
                v_more = part(tile, value_step, c, jm, width, WIDTH, WIDTH_MORE, MASKED)
            dp = product(do, do_more, v, v_more, WIDTH_MORE, PRECISION)
        if DROPS:
            dp = tl.where(kept_tile(drop, b, h, i, j), dp * drop.factor, 0.0)
        ds = p * (dp - less[:, None])
        if QUERY:
            steps = ds.to(k.dtype)
            dq = add_dot(dq, steps, k, PRECISION)
            if SIZE_MORE > 0:
                dq_more = add_dot(dq_more, steps, k_more, PRECISION)
        if FACTORS > 0:
            tile = factors + from_key * factor_step
            factor = part(tile, factor_step, c, jm, FACTORS, 0, FACTORS, MASKED)
            left_sums = add_fine(left_sums, ds, factor, SPLITS, PRECISION)
        if POINTS is not None:
            points = add_rows(points, ds, terms, KINDS, POINTS, b, h, i, j, im, jm)
        if LINE:
            # Diagonals that begin in this tile end in the next one, or the one after it.
            here, past, far = diagonal_sums(ds, ROWS, COLS)
            if ROWS > COLS:
                add_line(line, line_at + at - 2 * COLS, behind + far, n + m - 1, COLS)
                behind = ahead + past
            else:
                add_line(line, line_at + at - COLS, ahead + past, n + m - 1, COLS)
            ahead = here
    return dq, dq_more, left_sums, points, ahead, behind


@triton.jit
def queries_pass(
    query, key, value, grad, lse, delta, dq, dleft, lines, slots,
    query_steps, key_steps, value_steps, grad_steps, dq_steps,
    batch, heads, share, n, m, scale, unit, programs,
    columns, factors, terms, places, drop,
    size: tl.constexpr, width: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    FACTORS: tl.constexpr, BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr,
    QUERY: tl.constexpr, LINE: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr, FOLDS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """One program: blocks of ROWS queries, every programs-th of those of one entry of a table.

    Wanted are QUERY: dq like query, FACTORS (the columns of `factors`, or 0): dleft ``(b, h, i,
    FACTORS)``, float32 and contiguous, LINE: sums over diagonals (ROWS <= 2 COLS), POINTS: see
    `points_gradients`, or None. lines: `Lines`, whose batch and heads say what has an entry of its
    own. SPLITS: see `add_fine`. unit: see `weights`; if FOLDS with the scale. CHUNK: see
    `queries_sweep`. The rest as in `forward`.
    """
    entry = tl.program_id(0) // programs
    blocks = tl.cdiv(n, ROWS)
    inner_units = heads // lines.heads
    items = batch // lines.batch * inner_units * blocks
    line = lines.data + tl.program_id(0).to(tl.int64) * (n + m - 1)
    for item in range(tl.program_id(0) % programs, items, programs):
        block = item % blocks
        if BAND >= 2:
            block = blocks - 1 - block  # under a causal mask the last ones take longest
        pair = item // blocks
        b = (entry // lines.heads + pair // inner_units).to(tl.int64)
        h = (entry % lines.heads + pair % inner_units).to(tl.int64)
        r = tl.arange(0, ROWS)
        i = block * ROWS + r
        im = i < n
        above = (block * ROWS).to(tl.int64)
        queries = query + b * query_steps[0] + h * query_steps[1] + above * query_steps[2]
        grads = grad + b * grad_steps[0] + h * grad_steps[1] + above * grad_steps[2]
        q = queries + r[:, None] * query_steps[2]
        if CHUNK == 0:
            q = part(queries, query_steps[2], r, im, size, 0, SIZE, True)
        q_more = q
        if SIZE_MORE > 0 and CHUNK == 0:
            q_more = part(queries, query_steps[2], r, im, size, SIZE, SIZE_MORE, True)
        do = grads + r[:, None] * grad_steps[2]
        if CHUNK == 0:
            do = part(grads, grad_steps[2], r, im, width, 0, WIDTH, True)
        do_more = do
        if WIDTH_MORE > 0 and CHUNK == 0:
            do_more = part(grads, grad_steps[2], r, im, width, WIDTH, WIDTH_MORE, True)
        logs, less = row_values(lse, delta, b, h, heads, i, im, n)
        keys = key + b * key_steps[0] + h // share * key_steps[1]
        values = value + b * value_steps[0] + h // share * value_steps[1]
        left = q
        rights = keys
        right_step = 0
        if RANK > 0:
            lefts = columns.left + b * columns.left_batch + h * columns.left_head
            lefts += above * columns.left_row
            left = part(lefts, columns.left_row, r, im, RANK, 0, RANK, True)
            rights = columns.right + b * columns.right_batch + h * columns.right_head
            right_step = columns.right_row
        own = values
        factor_step = 0
        left_sums = tl.zeros((ROWS,), tl.float32)
        if FACTORS > 0:
            own = factors.right + b * factors.right_steps[0] + h * factors.right_steps[1]
            factor_step = factors.right_steps[2]
            left_sums = tl.zeros((ROWS, FACTORS), tl.float32)
        dq_more = tl.zeros((ROWS,), tl.float32)
        if SIZE_MORE > 0:
            dq_more = tl.zeros((ROWS, SIZE_MORE), tl.float32)
        points = logs
        if POINTS is not None:
            points = start_rows(KINDS, POINTS, ROWS)
        ahead = tl.zeros((COLS,), tl.float32)
        sums = (tl.zeros((ROWS, SIZE), tl.float32), dq_more, left_sums, points, ahead, ahead)
        first, last = span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
        inner, ended = whole_span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
        # Diagonals need neighbours in order: three loops, or one where registers are scarce.
        ONE: tl.constexpr = LINE and (SIZE > 64 or WIDTH > 64)
        if ONE:
            ended = inner
        start, before, whole, after = edges(first, last, inner, ended, COLS)
        line_at = n - 1 - block * ROWS
        rest, ahead_of_gap, gap, count = start, before, whole * COLS, before + after
        if LINE:
            tl.debug_barrier()  # what other threads added for another block is read again
        if LINE and not ONE:
            sums = queries_sweep(
                sums, q, q_more, do, do_more, logs, less, left,
                keys, values, rights, own, key_steps[2], value_steps[2], right_step, factor_step,
                start, before, 0, before, b, h, i, im, n, m, scale, unit,
                terms, places, drop, line, line_at,
                size, width, KINDS, RANK, FACTORS, BAND, RANGES, DROPS, QUERY, LINE, POINTS,
                PRECISION, SPLITS, FOLDS, CHUNK, True, ROWS, COLS,
                SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
            )  # fmt: skip
            rest, ahead_of_gap = start + (before + whole) * COLS, after
            gap, count = 0, after
        if not ONE:
            sums = queries_sweep(
                sums, q, q_more, do, do_more, logs, less, left,
                keys, values, rights, own, key_steps[2], value_steps[2], right_step, factor_step,
                start + before * COLS, whole, 0, whole, b, h, i, im, n, m, scale, unit,
                terms, places, drop, line, line_at,
                size, width, KINDS, RANK, FACTORS, BAND, RANGES, DROPS, QUERY, LINE, POINTS,
                PRECISION, SPLITS, FOLDS, CHUNK, False, ROWS, COLS,
                SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
            )  # fmt: skip
        sums = queries_sweep(
            sums, q, q_more, do, do_more, logs, less, left,
            keys, values, rights, own, key_steps[2], value_steps[2], right_step, factor_step,
            rest, ahead_of_gap, gap, count, b, h, i, im, n, m, scale, unit,
            terms, places, drop, line, line_at,
            size, width, KINDS, RANK, FACTORS, BAND, RANGES, DROPS, QUERY, LINE, POINTS,
            PRECISION, SPLITS, FOLDS, CHUNK, True, ROWS, COLS,
            SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
        )  # fmt: skip
        made, made_more, left_sums, points, ahead, behind = sums
        if LINE:
            end = start + (before + whole + after) * COLS
            if ROWS > COLS:
                add_line(line, line_at + end - 2 * COLS, behind, n + m - 1, COLS)
            add_line(line, line_at + end - COLS, ahead, n + m - 1, COLS)
        if QUERY:
            base = dq + b * dq_steps[0] + h * dq_steps[1] + above * dq_steps[2]
            store(base, dq_steps[2], r, im, made * scale, size, 0, SIZE)
            if SIZE_MORE > 0:
                store(base, dq_steps[2], r, im, made_more * scale, size, SIZE, SIZE_MORE)
        if FACTORS > 0:
            base = dleft + ((b * heads + h) * n + above) * FACTORS
            store(base, FACTORS, r, im, left_sums, FACTORS, 0, FACTORS)
        if POINTS is not None:
            store_rows(points, slots, terms, KINDS, POINTS, b, h, heads, block, blocks, i, im, n)
