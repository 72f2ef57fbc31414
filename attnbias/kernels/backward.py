"""What the backward kernels share: products, weights made again, sums over diagonals.

With ``p = e^(s - lse)`` and ``delta_i = do_i . o_i - dlse_i`` the gradient of the scores is ``ds =
p (dp - delta)``, ``dp = do v^T``. `backward_keys` owns keys and walks the queries that see them:
``dv = p^T do``, ``dk = scale ds^T q``, the sums of the columns of ds, ``ds^T u``.
`backward_queries` owns queries: ``dq = scale ds k``, ``ds v`` of the factors, sums over diagonals.
Scores are made again for each tile, nothing of size N x M is kept. Everything is summed in float32
by the one program that owns it, in a fixed order: no atomics, the same bits in every run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnbias.kernels.places import seen_tile
from attnbias.kernels.products import add_dot, dot
from attnbias.kernels.terms import add_terms

LOG2E = tl.constexpr(1.4426950408889634)


class Factors(NamedTuple):
    """Factors whose gradient is wanted, in float32: ``left[b, h, i, r]`` and ``right[b, h, j, r]``
    with a power of two of columns; steps: of batch, head and row.
    """

    left: Any
    left_steps: Any
    right: Any
    right_steps: Any


class Rows(NamedTuple):
    """With ranges of keys: all queries that see a key of a block lie in ``first[b, block] <= i <
    last[b, block]``, and those of ``inner <= i < ended`` see every key of it. 32-bit; batch is the
    step of all.
    """

    first: Any
    last: Any
    inner: Any
    ended: Any
    batch: Any


class Lines(NamedTuple):
    """Where sums over diagonals go: ``data[program, j - i + n - 1]``, float32, zeros at first.

    A program has a line of its own and walks what belongs to one entry of a table that has `batch`
    (1 or all) batch elements and `heads` (1 or all) heads.
    """

    data: Any
    batch: Any
    heads: Any


@triton.jit
def deltas(
    out, grad, lse, grad_lse, delta, out_steps, grad_steps, heads, n, width,
    LSE: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``delta = do . o - dlse``, 0 where a query sees nothing: it has no score."""
    blocks = tl.cdiv(n, ROWS)
    unit = tl.program_id(0) // blocks
    b = (unit // heads).to(tl.int64)
    h = (unit % heads).to(tl.int64)
    i = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    im = i < n
    o = load_block(out, out_steps, b, h, i, im, width, WIDTH).to(tl.float32)
    do = load_block(grad, grad_steps, b, h, i, im, width, WIDTH).to(tl.float32)
    found = tl.sum(o * do, 1)
    at = (b * heads + h) * n + i
    if LSE:
        found -= tl.load(grad_lse + at, mask=im, other=0.0)
    found = tl.where(tl.load(lse + at, mask=im, other=0.0) == float("-inf"), 0.0, found)
    tl.store(delta + at, found, mask=im)


@triton.jit
def load_block(tensor, steps, b, h, at, there, size, SIZE: tl.constexpr):
    """``tensor[b, h, at]`` as ``(rows, SIZE)``, zeros beyond."""
    d = tl.arange(0, SIZE)
    return tl.load(
        tensor + b * steps[0] + h * steps[1] + at.to(tl.int64)[:, None] * steps[2] + d[None, :],
        mask=there[:, None] & (d < size)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def row_values(lse, delta, b, h, heads, i, im, n):
    """Log-sum-exp to the base 2, plus infinity where nothing is seen or no row is there: weights
    are 0 without a mask. And delta.
    """
    at = (b * heads + h) * n + i
    logs = tl.load(lse + at, mask=im, other=float("-inf"))
    logs = tl.where(logs == float("-inf"), float("inf"), logs * LOG2E)
    return logs, tl.load(delta + at, mask=im, other=0.0)


@triton.jit
def product(x, x_more, y, y_more, MORE: tl.constexpr, PRECISION: tl.constexpr):
    """``x y^T`` of rows that lie in two parts."""
    s = dot(x, tl.trans(y), PRECISION)
    if MORE > 0:
        s = add_dot(s, x_more, tl.trans(y_more), PRECISION)
    return s


@triton.jit
def chunks(
    x, xm, y, y_step, rows, ym, size, TALL: tl.constexpr, WIDE: tl.constexpr,
    CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x y^T (TALL, WIDE)``, CHUNK features at a time, read where they lie: for heads too wide to
    stay in the registers. x: pointers to its rows, y: one to its first row.
    """
    d = tl.arange(0, CHUNK)
    s = tl.zeros((TALL, WIDE), tl.float32)
    for ahead in range(0, size, CHUNK):
        some = (ahead + d < size)[None, :]
        one = tl.load(x + (ahead + d)[None, :], mask=xm[:, None] & some, other=0.0)
        two = y + rows[:, None] * y_step + (ahead + d)[None, :]
        two = tl.load(two, mask=ym[:, None] & some, other=0.0)
        s = add_dot(s, one, tl.trans(two), PRECISION)
    return s


@triton.jit
def add_fine(total, ds, factor, SPLITS: tl.constexpr, PRECISION: tl.constexpr):
    """``total + ds factor``, both float32: with SPLITS from products of bfloat16, of the first and
    the second eight bits of each, which err by 2^-16.
    """
    if SPLITS:
        one, more = ds.to(tl.bfloat16), factor.to(tl.bfloat16)
        rest = (factor - more.to(tl.float32)).to(tl.bfloat16)
        total = add_dot(total, one, more, PRECISION)
        total = add_dot(total, one, rest, PRECISION)
        rest = (ds - one.to(tl.float32)).to(tl.bfloat16)
        total = add_dot(total, rest, more, PRECISION)
    else:
        total = add_dot(total, ds, factor, PRECISION)
    return total


@triton.jit
def weights(
    s, unit, logs, terms, places, b, h, i, j, im, jm, n,
    KINDS: tl.constexpr, BAND: tl.constexpr, RANGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """``e^(s + terms - lse)``; 0 where hidden, if MASKED. unit: log2 e, or with it the scale of
    scores that have nothing to add.
    """
    s = add_terms(s, terms, KINDS, b, h, i, j, im, jm, n)
    if MASKED:
        s = tl.where(seen_tile(places, b, i, j, im, jm, BAND, RANGES), s, float("-inf"))
    return tl.exp2(s * unit - logs[:, None])


@triton.jit
def diagonal_sums(ds, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums over the diagonals of ``ds (ROWS, COLS)``, ROWS <= 2 COLS: those ``c``, ``c - COLS`` and
    ``c - 2 COLS`` right of the main one, for every c below COLS.

    Row r is turned by r columns, so that diagonals become columns. Through shared memory, in blocks
    of 8 x 8: the parts of a tile of scores that a warp holds, and those it reads here, eight
    columns of four rows, each lie in different banks.
    """
    WIDE: tl.constexpr = COLS // 8
    blocks = tl.permute(tl.reshape(ds, (ROWS // 8, 8, WIDE, 8)), (0, 2, 1, 3))
    place = tl.arange(0, ROWS * COLS)
    row, col = place // (8 * COLS), place // 64 % WIDE  # of blocks
    inner, shift = place // 8 % 8, place % 8 + place // 8 % 8
    to = row + col + shift // 8
    at = row * (8 * COLS) + to % WIDE * 64 + inner * 8 + shift % 8
    turned = tl.gather(tl.reshape(blocks, (ROWS * COLS,)), at, 0)
    here = column_sums(tl.where(to < WIDE, turned, 0.0), ROWS, COLS)
    far = here
    if ROWS > COLS:
        middle = (to >= WIDE) & (to < 2 * WIDE)
        behind = column_sums(tl.where(middle, turned, 0.0), ROWS, COLS)
        far = column_sums(tl.where(to >= 2 * WIDE, turned, 0.0), ROWS, COLS)
    else:
        behind = column_sums(tl.where(to >= WIDE, turned, 0.0), ROWS, COLS)
    return here, behind, far


@triton.jit
def column_sums(turned, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Sums over rows of entries that lie in blocks of 8 x 8."""
    blocks = tl.reshape(turned, (ROWS // 8, COLS // 8, 8, 8))
    return tl.reshape(tl.sum(tl.sum(blocks, 0), 1), (COLS,))


@triton.jit
def add_line(line, at, sums, length, COLS: tl.constexpr):
    """``line[at : at + COLS] += sums``, as far as there is a line."""
    to = at + tl.arange(0, COLS)
    there = (to >= 0) & (to < length)
    tl.store(line + to, tl.load(line + to, mask=there, other=0.0) + sums, mask=there)
