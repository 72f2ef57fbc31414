"""The forward kernel: attention of one block of queries over the keys that it sees, one pass.

Per tile of keys: ``s = scale q k^T + u v^T + terms``, hidden outside the band and the ranges, then
the online softmax. Weights are exponentials to the base 2 of scores times log2 e.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnbias.kernels.pattern import kept_tile
from attnbias.kernels.places import seen_tile, span
from attnbias.kernels.terms import add_terms

LOG2E = tl.constexpr(1.4426950408889634)


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
def forward(
    query, key, value, out, lse,
    query_steps, key_steps, value_steps, out_steps,
    heads, share, n, m, size, width, scale,
    columns, terms, places, drop,
    KINDS: tl.constexpr, RANK: tl.constexpr, BAND: tl.constexpr, RANGES: tl.constexpr,
    DROPS: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One program: ROWS queries of one head.

    query ``(b, h, i, size)``, key ``(b, h // share, j, size)``, value ``(.., width)``; *_steps:
    (batch, head, row), the last dimension is contiguous. out like query, lse ``(b, h, n)``
    contiguous. columns: `Columns` or None; RANK its columns or 0. places: `Places`; drop: `Drop` or
    None. SIZE, WIDTH: powers of two that hold size and width.
    """
    block = tl.program_id(0)
    unit = tl.program_id(1)
    b = (unit // heads).to(tl.int64)
    h = (unit % heads).to(tl.int64)
    group = h // share
    i = block * ROWS + tl.arange(0, ROWS)
    im = i < n
    d = tl.arange(0, SIZE)
    f = tl.arange(0, WIDTH)
    q = tl.load(
        query + b * query_steps[0] + h * query_steps[1]
        + i.to(tl.int64)[:, None] * query_steps[2] + d[None, :],
        mask=im[:, None] & (d < size)[None, :], other=0.0,
    )  # fmt: skip
    keys = key + b * key_steps[0] + group * key_steps[1]
    values = value + b * value_steps[0] + group * value_steps[1]
    if RANK > 0:
        r = tl.arange(0, RANK)
        left = tl.load(
            columns.left + b * columns.left_batch + h * columns.left_head
            + i.to(tl.int64)[:, None] * columns.left_row + r[None, :],
            mask=im[:, None], other=0.0,
        )  # fmt: skip
        rights = columns.right + b * columns.right_batch + h * columns.right_head
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    first, last = span(places, b, block, i, im, n, m, BAND, RANGES, ROWS)
    for start in range(first // COLS * COLS, last, COLS):
        j = start + tl.arange(0, COLS)
        jm = j < m
        j64 = j.to(tl.int64)
        k = tl.load(
            keys + j64[None, :] * key_steps[2] + d[:, None],
            mask=jm[None, :] & (d < size)[:, None], other=0.0,
        )  # fmt: skip
        s = tl.dot(q, k, input_precision=PRECISION) * scale
        if RANK > 0:
            right = tl.load(
                rights + j64[None, :] * columns.right_row + r[:, None],
                mask=jm[None, :], other=0.0,
            )  # fmt: skip
            s += tl.dot(left, right, input_precision=PRECISION)
        s = add_terms(s, terms, KINDS, b, h, i, j, im, jm, n)
        s = tl.where(seen_tile(places, b, i, j, im, jm, BAND, RANGES), s, float("-inf"))
        grown = tl.maximum(top, tl.max(s, 1))
        # A row that has seen nothing yet: minus infinity less itself would be NaN.
        safe = tl.where(grown == float("-inf"), 0.0, grown)
        fade = tl.exp2((top - safe) * LOG2E)
        p = tl.exp2((s - safe[:, None]) * LOG2E)
        total = total * fade + tl.sum(p, 1)
        if DROPS:
            p = tl.where(kept_tile(drop, b, h, i, j), p * drop.factor, 0.0)
        v = tl.load(
            values + j64[:, None] * value_steps[2] + f[None, :],
            mask=jm[:, None] & (f < width)[None, :], other=0.0,
        )  # fmt: skip
        sums = sums * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = grown
    safe_total = tl.where(total == 0.0, 1.0, total)
    tl.store(
        out + b * out_steps[0] + h * out_steps[1]
        + i.to(tl.int64)[:, None] * out_steps[2] + f[None, :],
        (sums / safe_total[:, None]).to(out.dtype.element_ty),
        mask=im[:, None] & (f < width)[None, :],
    )  # fmt: skip
    logs = tl.where(total == 0.0, float("-inf"), top + tl.log(safe_total))
    tl.store(lse + (b * heads + h) * n + i, logs, mask=im)
