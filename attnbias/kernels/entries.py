"""The gradient of the entries of a bias, summed on chip over what the bias broadcasts.

The way to every parameter whose gradient is not made by the other passes: a table on a grid, one by
classes, a matrix. ``ds = p (dp - delta)`` of a tile is added up over the batch elements and heads
(and, of one row for all queries, over the queries) that share its entries, in registers and in a
fixed order, and written once; entries that the batch shares are read once, too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnbias import kernels
from attnbias.kernels import backward_launch, configs
from attnbias.kernels.backward import row_values
from attnbias.kernels.forward import part
from attnbias.kernels.pattern import kept_tile
from attnbias.kernels.places import seen_tile, span
from attnbias.kernels.products import add_dot, dot
from attnbias.kernels.terms import add_terms

LOG2E = tl.constexpr(1.4426950408889634)
PROGRAMS = 512  # tiles of few entries are shared by so many programs, about, and summed after


@triton.jit
def product(
    x, x_steps, x_head, i, im, y, y_steps, y_head, j, jm, b,
    size: tl.constexpr, ONE: tl.constexpr, MORE: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """``x[b, x_head, i] . y[b, y_head, j]`` of `size` features: ONE and MORE (or 0) hold them, or
    CHUNK at a time.
    """
    x = x + b * x_steps[0] + x_head * x_steps[1]
    y = y + b * y_steps[0] + y_head * y_steps[1]
    i = i.to(tl.int64)
    j = j.to(tl.int64)
    if CHUNK > 0:
        s = tl.zeros((ROWS, COLS), tl.float32)
        d = tl.arange(0, CHUNK)
        for first in range(0, size, CHUNK):
            there = (first + d < size)[None, :]
            one = x + i[:, None] * x_steps[2] + (first + d)[None, :]
            two = y + j[:, None] * y_steps[2] + (first + d)[None, :]
            one = tl.load(one, mask=im[:, None] & there, other=0.0)
            two = tl.load(two, mask=jm[:, None] & there, other=0.0)
            s = add_dot(s, one, tl.trans(two), PRECISION)
    else:
        one = part(x, x_steps[2], i, im, size, 0, ONE, True)
        two = part(y, y_steps[2], j, jm, size, 0, ONE, True)
        s = dot(one, tl.trans(two), PRECISION)
        if MORE > 0:
            one = part(x, x_steps[2], i, im, size, ONE, MORE, True)
            two = part(y, y_steps[2], j, jm, size, ONE, MORE, True)
            s = add_dot(s, one, tl.trans(two), PRECISION)
    return s


@triton.jit
def entries(
    query, key, value, grad, lse, delta, out,
    query_steps, key_steps, value_steps, grad_steps, out_steps,
    heads, share, n, m, scale,
    first_batch, first_head, first_block, end_block, first_col, end_col,
    summed_batch, summed_heads, out_heads, parts,
    columns, shared, terms, places, drop,
    size: tl.constexpr, width: tl.constexpr, SHARED: tl.constexpr, KINDS: tl.constexpr,
    RANK: tl.constexpr, BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr,
    PRECISION: tl.constexpr, CHUNK: tl.constexpr, DOWN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """One program: a tile of the gradient of one batch element and head of the bias, or a part of
    what is summed in it.

    out ``(parts, batch | 1, heads | 1, rows, cols)`` float32: blocks of ROWS queries from
    first_block to end_block, keys from first_col to end_col. summed_batch, summed_heads: batch
    elements and heads that one entry sums over. shared, SHARED: terms whose entries are the same
    for all of these; terms, KINDS: the others. DOWN: out has one row, the sum over the queries.
    The rest as in `forward`.
    """
    wide = tl.cdiv(end_col - first_col, COLS)
    tall = 1 if DOWN else end_block - first_block
    at = tl.program_id(0)
    share_of = at % parts
    at = at // parts
    start = first_col + at % wide * COLS
    at = at // wide
    block = first_block + at % tall
    unit = at // tall
    own_b = unit // out_heads
    own_h = unit % out_heads
    j = start + tl.arange(0, COLS)
    jm = j < end_col
    sums = tl.zeros((COLS,) if DOWN else (ROWS, COLS), tl.float32)
    for top in range(block, end_block if DOWN else block + 1):
        i = top * ROWS + tl.arange(0, ROWS)
        im = i < n
        b = (first_batch + own_b).to(tl.int64)
        h = (first_head + own_h).to(tl.int64)
        if len(SHARED) > 0:
            base = tl.zeros((ROWS, COLS), tl.float32)
            base = add_terms(base, shared, SHARED, b, h, i, j, im, jm, n)
        members = summed_batch * summed_heads
        if not RANGES:
            first, last = span(places, b, top, i, im, n, m, BAND, RANGES, ROWS)
            members = tl.where((start < last) & (start + COLS > first), members, 0)
        for member in range(share_of, members, parts):
            b = (first_batch + own_b + member // summed_heads).to(tl.int64)
            h = (first_head + own_h + member % summed_heads).to(tl.int64)
            some = True
            if RANGES:
                first, last = span(places, b, top, i, im, n, m, BAND, RANGES, ROWS)
                some = (start < last) & (start + COLS > first)
            if some:
                s = product(
                    query, query_steps, h, i, im, key, key_steps, h // share, j, jm, b,
                    size, SIZE, SIZE_MORE, CHUNK, PRECISION, ROWS, COLS,
                )  # fmt: skip
                s *= scale
                if RANK > 0:
                    s += product(
                        columns.left,
                        (columns.left_batch, columns.left_head, columns.left_row), h, i, im,
                        columns.right,
                        (columns.right_batch, columns.right_head, columns.right_row), h, j, jm, b,
                        RANK, RANK, 0, CHUNK, PRECISION, ROWS, COLS,
                    )  # fmt: skip
                if len(SHARED) > 0:
                    s += base
                s = add_terms(s, terms, KINDS, b, h, i, j, im, jm, n)
                logs, less = row_values(lse, delta, b, h, heads, i, im, n)
                seen = seen_tile(places, b, i, j, im, jm, BAND, RANGES)
                p = tl.exp2(tl.where(seen, s * LOG2E - logs[:, None], float("-inf")))
                dp = product(
                    grad, grad_steps, h, i, im, value, value_steps, h // share, j, jm, b,
                    width, WIDTH, WIDTH_MORE, CHUNK, PRECISION, ROWS, COLS,
                )  # fmt: skip
                if DROPS:
                    dp = tl.where(kept_tile(drop, b, h, i, j), dp * drop.factor, 0.0)
                ds = p * (dp - less[:, None])
                sums += tl.sum(ds, 0) if DOWN else ds
    to = out + share_of.to(tl.int64) * out_steps[0]
    to += own_b.to(tl.int64) * out_steps[1] + own_h.to(tl.int64) * out_steps[2]
    if DOWN:
        tl.store(to + (j - first_col), sums, mask=jm)
    else:
        i = block * ROWS + tl.arange(0, ROWS)
        row = (i - first_block * ROWS).to(tl.int64)
        tl.store(
            to + row[:, None] * out_steps[3] + (j - first_col)[None, :],
            sums, mask=(i < n)[:, None] & jm[None, :],
        )  # fmt: skip


def config(dtype: torch.dtype, size: int, width: int) -> configs.Config:
    """Tile sizes of `entries`: four tiles of float32 are alive at a time."""
    if kernels.interpreted():
        return configs.Config(32, 32, 4, 1, "ieee")
    how = configs.precision(dtype)
    if dtype == torch.float32:
        return configs.Config(32, 32, 4, 2, how)
    if _large():
        return configs.Config(64, 64, 8, 2, how)
    wide = max(size, width)
    if wide <= 64:
        return configs.Config(32, 64, 8, 2, how)
    stages = 1 if wide > 128 and configs.card()[0] == "hip" else 2
    return configs.Config(64, 32, 8, stages, how)


def chunk(dtype: torch.dtype, size: int, width: int) -> int:
    """Features that are multiplied at a time; 0: all of a head."""
    wide = max(size, width)
    if dtype == torch.float32:
        return 32 if wide <= 64 else 16
    if kernels.interpreted() or _large():
        return 64 if wide > 128 else 0
    return 32 if wide > 64 else 0


def _large() -> bool:
    """Whether operands of products may lie in shared memory: Hopper's and newer ones."""
    backend, number = configs.card()
    return backend == "cuda" and number >= 90


def block_rows(work: backward_launch.Work) -> int:
    """A strip begins at a multiple of so many queries."""
    return config(work.query.dtype, work.query.shape[-1], work.value.shape[-1]).rows


def strip(
    work: backward_launch.Work,
    own: tuple[slice, slice],
    together: tuple[bool, bool, bool],
    rows: slice,
    cols: slice,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of some entries, float32 ``(batch, heads, rows, keys)``.

    own: batch elements and heads; together: whether the batch elements, the heads, the queries are
    summed, then that size is 1. rows begin at a multiple of `block_rows`. out: where it is written,
    the keys in one piece.
    """
    batch, heads = (s.stop - s.start for s in own)
    n, m = work.query.shape[2], work.key.shape[2]
    size, width = work.query.shape[-1], work.value.shape[-1]
    chosen = config(work.query.dtype, size, width)
    sums = (batch if together[0] else 1, heads if together[1] else 1)
    shape = (batch // sums[0], heads // sums[1])
    first, end = rows.start // chosen.rows, triton.cdiv(rows.stop, chosen.rows)
    wide = triton.cdiv(cols.stop - cols.start, chosen.cols)
    tiles = shape[0] * shape[1] * wide * (1 if together[2] else end - first)
    # By shapes alone, so that sums repeat bit for bit on any card.
    parts = max(1, min(sums[0] * sums[1], PROGRAMS // max(tiles, 1)))
    tall = 1 if together[2] else rows.stop - rows.start
    full = (*shape, tall, cols.stop - cols.start)
    made = work.lse.new_empty(parts, *full) if out is None or parts > 1 else out[None]
    given = work.given
    kinds, terms = given.kinds, given.terms
    same = [_same(t, sums[0] > 1, sums[1] > 1) for t in terms]
    (one, more), (large, larger) = configs.halves(size), configs.halves(width)
    kernel: Any = entries
    kernel[(tiles * parts,)](
        *work.tensors(),
        made,
        *work.steps(),
        made.stride()[:4],
        work.query.shape[1],
        work.query.shape[1] // work.key.shape[1],
        n,
        m,
        work.scale,
        own[0].start,
        own[1].start,
        first,
        end,
        cols.start,
        cols.stop,
        *sums,
        shape[1],
        parts,
        given.columns,
        tuple(t for t, s in zip(terms, same, strict=True) if s),
        tuple(t for t, s in zip(terms, same, strict=True) if not s),
        given.places,
        given.drop,
        size=size,
        width=width,
        SHARED=tuple(k for k, s in zip(kinds, same, strict=True) if s),
        KINDS=tuple(k for k, s in zip(kinds, same, strict=True) if not s),
        RANK=given.rank,
        BAND=given.band,
        RANGES=given.ranges,
        DROPS=given.drop is not None,
        PRECISION=chosen.precision,
        CHUNK=chunk(work.query.dtype, size, width),
        DOWN=together[2],
        ROWS=chosen.rows,
        COLS=chosen.cols,
        SIZE=one,
        SIZE_MORE=more,
        WIDTH=large,
        WIDTH_MORE=larger,
        **chosen.options(),
    )
    total = made[0] if parts == 1 else made.sum(0)
    return total if out is None or parts == 1 else out.copy_(total)


def _same(term: Any, batch: bool, heads: bool) -> bool:
    """Whether a term has the same entries for all batch elements, all heads that are summed."""
    for name, step in zip(term._fields, term, strict=True):
        summed = (batch and name.endswith("batch")) or (heads and name.endswith("head"))
        if summed and step != 0:
            return False
    return True


__all__ = ["block_rows", "config", "entries", "strip"]
