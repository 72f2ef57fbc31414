"""Gradients of keys and values, and what is summed over queries: see `attnbias.kernels.backward`.

Products are made with the keys as rows, ``s^T = k q^T``: the weights and their gradients are
operands of the next products as they lie.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnbias.kernels.backward import add_fine, chunks, product, row_values, weights
from attnbias.kernels.forward import edges, part, store
from attnbias.kernels.pattern import kept_tile
from attnbias.kernels.points_gradients import add_cols, start_cols, store_cols
from attnbias.kernels.products import add_dot, dot


@triton.jit
def keys_sweep(
    sums, k, k_more, v, v_more, right,
    queries, grads, lse, delta, lefts, factors, query_step, grad_step, left_step, factor_step,
    start, before, gap, count, b, h, heads, j, jm, n, scale, unit, terms, places, drop,
    size: tl.constexpr, width: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    FACTORS: tl.constexpr, BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROW: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr, FOLDS: tl.constexpr,
    CHUNK: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """Adds to `sums` what `count` tiles of queries bring, from `start`, with a `gap` after the
    first `before` of them. Not MASKED: every entry is seen. k, v: tiles of keys and values, or
    with a CHUNK of features that are multiplied at a time pointers to them.
    """
    dk, dk_more, dv, dv_more, row, right_sums, points = sums
    for t in range(count):
        at = start + t * ROWS
        if MASKED:
            at += tl.where(t >= before, gap, 0)
        r = tl.arange(0, ROWS)
        i = at + r
        im = i < n
        if not MASKED:
            im = tl.full((ROWS,), True, tl.int1)
        from_row = at.to(tl.int64)
        tile = queries + from_row * query_step
        q = part(tile, query_step, r, im, size, 0, SIZE, MASKED)
        q_more = q
        if SIZE_MORE > 0:
            q_more = part(tile, query_step, r, im, size, SIZE, SIZE_MORE, MASKED)
        tile = grads + from_row * grad_step
        do = part(tile, grad_step, r, im, width, 0, WIDTH, MASKED)
        do_more = do
        if WIDTH_MORE > 0:
            do_more = part(tile, grad_step, r, im, width, WIDTH, WIDTH_MORE, MASKED)
        logs, less = row_values(lse, delta, b, h, heads, i, im, n)
        if CHUNK > 0:
            tile = queries + from_row * query_step
            s = chunks(k, jm, tile, query_step, r, im, size, COLS, ROWS, CHUNK, PRECISION)
        else:
            s = product(k, k_more, q, q_more, SIZE_MORE, PRECISION)
        if not FOLDS:
            s = s * scale
        if RANK > 0:
            left = part(lefts + from_row * left_step, left_step, r, im, RANK, 0, RANK, MASKED)
            s += dot(right, tl.trans(left), PRECISION)
        p = weights(
            tl.trans(s), unit, logs, terms, places, b, h, i, j, im, jm, n,
            KINDS, BAND, RANGES, MASKED,
        )  # fmt: skip
        if DROPS:
            kept = kept_tile(drop, b, h, i, j)
        if VALUE:
            stays = p
            if DROPS:
                stays = tl.where(kept, p * drop.factor, 0.0)
            stays = tl.trans(stays).to(do.dtype)
            dv = add_dot(dv, stays, do, PRECISION)
            if WIDTH_MORE > 0:
                dv_more = add_dot(dv_more, stays, do_more, PRECISION)
        if KEY or ROW or FACTORS > 0 or POINTS is not None:
            if CHUNK > 0:
                tile = grads + from_row * grad_step
                dp = chunks(v, jm, tile, grad_step, r, im, width, COLS, ROWS, CHUNK, PRECISION)
            else:
                dp = product(v, v_more, do, do_more, WIDTH_MORE, PRECISION)
            dp = tl.trans(dp)
            if DROPS:
                dp = tl.where(kept, dp * drop.factor, 0.0)
            ds = p * (dp - less[:, None])
            if POINTS is not None:
                points = add_cols(points, ds, terms, KINDS, POINTS, b, h, i, j, im, jm)
            ds = tl.trans(ds)
            if KEY:
                steps = ds.to(q.dtype)
                dk = add_dot(dk, steps, q, PRECISION)
                if SIZE_MORE > 0:
                    dk_more = add_dot(dk_more, steps, q_more, PRECISION)
            if ROW:
                row += tl.sum(ds, 1)
            if FACTORS > 0:
                tile = factors + from_row * factor_step
                factor = part(tile, factor_step, r, im, FACTORS, 0, FACTORS, MASKED)
                right_sums = add_fine(right_sums, ds, factor, SPLITS, PRECISION)
    return dk, dk_more, dv, dv_more, row, right_sums, points


@triton.jit
def keys_pass(
    query, key, value, grad, lse, delta, dk, dv, drow, dright, slots,
    query_steps, key_steps, value_steps, grad_steps, dk_steps, dv_steps,
    heads, share, n, m, scale, unit,
    columns, factors, terms, places, rows, drop,
    size: tl.constexpr, width: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    FACTORS: tl.constexpr, BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, ROW: tl.constexpr, POINTS: tl.constexpr,
    PRECISION: tl.constexpr, SPLITS: tl.constexpr, FOLDS: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """One program: COLS keys of one group of heads, all heads of the group.

    Wanted are KEY: dk ``(b, group, j, size)``, VALUE: dv, ROW: drow ``(b, h, j)``, FACTORS (the
    columns of `factors`, or 0): dright ``(b, h, j, FACTORS)``, both float32 and contiguous,
    POINTS: see `points_gradients`, or None. rows: `Rows` or None. SPLITS: see `add_fine`. unit:
    see `weights`; if FOLDS with the scale. CHUNK: see `keys_sweep`. The rest as in `forward`.
    """
    blocks = tl.cdiv(m, COLS)
    groups = heads // share
    block = tl.program_id(0) % blocks
    pair = tl.program_id(0) // blocks
    b = (pair // groups).to(tl.int64)
    group = (pair % groups).to(tl.int64)
    c = tl.arange(0, COLS)
    left_key = block * COLS
    j = left_key + c
    jm = j < m
    from_key = left_key.to(tl.int64)
    keys = key + b * key_steps[0] + group * key_steps[1] + from_key * key_steps[2]
    values = value + b * value_steps[0] + group * value_steps[1] + from_key * value_steps[2]
    k = keys + c[:, None] * key_steps[2]
    if CHUNK == 0:
        k = part(keys, key_steps[2], c, jm, size, 0, SIZE, True)
    k_more = k
    if SIZE_MORE > 0 and CHUNK == 0:
        k_more = part(keys, key_steps[2], c, jm, size, SIZE, SIZE_MORE, True)
    v = values + c[:, None] * value_steps[2]
    if CHUNK == 0:
        v = part(values, value_steps[2], c, jm, width, 0, WIDTH, True)
    v_more = v
    if WIDTH_MORE > 0 and CHUNK == 0:
        v_more = part(values, value_steps[2], c, jm, width, WIDTH, WIDTH_MORE, True)
    first = tl.zeros((), tl.int32)
    last = first + n
    inner = first
    ended = last
    right_key = tl.minimum(left_key + COLS, m) - 1
    if BAND >= 2:
        first = tl.maximum(first, left_key - places.high)
        inner = tl.maximum(inner, right_key - places.high)
    if BAND % 2 == 1:
        last = tl.minimum(last, right_key - places.low + 1)
        ended = tl.minimum(ended, left_key - places.low + 1)
    if RANGES:
        at = b * rows.batch + block
        first = tl.maximum(first, tl.load(rows.first + at))
        last = tl.minimum(last, tl.load(rows.last + at))
        inner = tl.maximum(inner, tl.load(rows.inner + at))
        ended = tl.minimum(ended, tl.load(rows.ended + at))
    start, before, whole, after = edges(first, last, inner, ended, ROWS)
    sums = tl.zeros((COLS, SIZE), tl.float32)
    sums_more = tl.zeros((COLS,), tl.float32)
    if SIZE_MORE > 0:
        sums_more = tl.zeros((COLS, SIZE_MORE), tl.float32)
    values_sums = tl.zeros((COLS, WIDTH), tl.float32)
    values_more = tl.zeros((COLS,), tl.float32)
    if WIDTH_MORE > 0:
        values_more = tl.zeros((COLS, WIDTH_MORE), tl.float32)
    points = tl.zeros((COLS,), tl.float32)
    if POINTS is not None:
        points = start_cols(KINDS, POINTS, COLS)
    for member in range(share):
        h = group * share + member
        queries = query + b * query_steps[0] + h * query_steps[1]
        grads = grad + b * grad_steps[0] + h * grad_steps[1]
        right = k
        lefts = queries
        left_step = 0
        if RANK > 0:
            rights = columns.right + b * columns.right_batch + h * columns.right_head
            rights += from_key * columns.right_row
            right = part(rights, columns.right_row, c, jm, RANK, 0, RANK, True)
            lefts = columns.left + b * columns.left_batch + h * columns.left_head
            left_step = columns.left_row
        own = grads
        factor_step = 0
        row = tl.zeros((COLS,), tl.float32)
        right_sums = row
        if FACTORS > 0:
            own = factors.left + b * factors.left_steps[0] + h * factors.left_steps[1]
            factor_step = factors.left_steps[2]
            right_sums = tl.zeros((COLS, FACTORS), tl.float32)
        found = (sums, sums_more, values_sums, values_more, row, right_sums, points)
        found = keys_sweep(
            found, k, k_more, v, v_more, right,
            queries, grads, lse, delta, lefts, own,
            query_steps[2], grad_steps[2], left_step, factor_step,
            start + before * ROWS, whole, 0, whole, b, h, heads, j, jm, n, scale, unit,
            terms, places, drop,
            size, width, KINDS, RANK, FACTORS, BAND, RANGES, DROPS, KEY, VALUE, ROW, POINTS,
            PRECISION, SPLITS, FOLDS, CHUNK, False, ROWS, COLS, SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
        )  # fmt: skip
        found = keys_sweep(
            found, k, k_more, v, v_more, right,
            queries, grads, lse, delta, lefts, own,
            query_steps[2], grad_steps[2], left_step, factor_step,
            start, before, whole * ROWS, before + after, b, h, heads, j, jm, n, scale, unit,
            terms, places, drop,
            size, width, KINDS, RANK, FACTORS, BAND, RANGES, DROPS, KEY, VALUE, ROW, POINTS,
            PRECISION, SPLITS, FOLDS, CHUNK, True, ROWS, COLS, SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
        )  # fmt: skip
        sums, sums_more, values_sums, values_more, row, right_sums, points = found
        if ROW:
            tl.store(drow + (b * heads + h) * m + j, row, mask=jm)
        if FACTORS > 0:
            base = dright + ((b * heads + h) * m + from_key) * FACTORS
            store(base, FACTORS, c, jm, right_sums, FACTORS, 0, FACTORS)
    if KEY:
        base = dk + b * dk_steps[0] + group * dk_steps[1] + from_key * dk_steps[2]
        store(base, dk_steps[2], c, jm, sums * scale, size, 0, SIZE)
        if SIZE_MORE > 0:
            store(base, dk_steps[2], c, jm, sums_more * scale, size, SIZE, SIZE_MORE)
    if VALUE:
        base = dv + b * dv_steps[0] + group * dv_steps[1] + from_key * dv_steps[2]
        store(base, dv_steps[2], c, jm, values_sums, width, 0, WIDTH)
        if WIDTH_MORE > 0:
            store(base, dv_steps[2], c, jm, values_more, width, WIDTH, WIDTH_MORE)
    if POINTS is not None:
        store_cols(points, slots, KINDS, POINTS, b * groups + group, j, jm, m)
