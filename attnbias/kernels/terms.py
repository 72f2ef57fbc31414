"""What a bias is to a kernel: terms that are added to a tile of scores, each from what it stores.

A kernel is given ``terms``, a tuple of the named tuples below (tensors and steps: a step of 0
broadcasts), and ``KINDS``, a constant tuple of the same length that names them. `add_terms` adds
the entries of one tile; every kernel calls it. Places are absolute: query ``i``, key ``j``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from attnbias.kernels.points import add_points


class Row(NamedTuple):
    """``data[b, h, j]``: a key bias."""

    data: Any
    batch: Any
    head: Any


class Strip(NamedTuple):
    """``data[b, h, c, j - i + n - 1 - c]`` for any copy c of 0 to 3: the diagonals of a `Relative`,
    stored four times, each copy without the first element of the one before, so that every row of
    a tile finds one in which its keys begin at a multiple of four: `strip` makes them.
    """

    data: Any
    batch: Any
    head: Any
    copy: Any


class Whole(NamedTuple):
    """``data[b, h, i, j]`` where it lies: a `Dense`, any dimension broadcast."""

    data: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class Indexed(NamedTuple):
    """``data[b, h, rows[b, h, i] + cols[b, h, j]]``: tables of a grid, of classes, and both with
    queries and keys exchanged. Kind ``"indexed_some"``: where that sum is negative, one of the two
    is a token without a place, of which there are `over` among the queries and `left` among the
    keys, before the others: ``data[b, h, start + min(i, over) (left + 1) + min(j, left)]``.
    """

    data: Any
    batch: Any
    head: Any
    rows: Any
    rows_batch: Any
    rows_head: Any
    cols: Any
    cols_batch: Any
    cols_head: Any
    over: Any
    left: Any
    start: Any


class Fours(NamedTuple):
    """`Indexed` where four keys at a time, from a multiple of four on, have neighbouring entries:
    keys of a grid. ``data[b, h, k, e]`` is entry ``e + k`` for k from 0 to 3, a copy step apart, so
    that four of them are always read from a multiple of four.
    """

    data: Any
    batch: Any
    head: Any
    copy: Any
    rows: Any
    rows_batch: Any
    cols: Any


class Spread(NamedTuple):
    """``data[b, h, i, index[j - i + n - 1]]``: a query times a few vectors, one a distance."""

    data: Any
    batch: Any
    head: Any
    row: Any
    index: Any


class Same(NamedTuple):
    """Hidden where not ``rows[b, i] == cols[b, j]``: scattered segments."""

    rows: Any
    rows_batch: Any
    cols: Any
    cols_batch: Any


class Box(NamedTuple):
    """Hidden where not ``0 <= cell[d, j] - first[d, i] <= wide[d, i]`` along every dimension d, in
    steps of its gap: neighborhoods. The kind is ``("box", exchanged, *gaps)``: with `exchanged` the
    key has the window and the query the cell. edge, cells: numbers of a dimension.
    """

    first: Any
    wide: Any
    edge: Any
    cell: Any
    cells: Any


def strip(table: Tensor) -> Strip:
    """Of a table ``(batch | 1, heads | 1, queries + keys - 1)`` in float32."""
    return Strip(*shifted(table))


def shifted(table: Tensor) -> tuple[Tensor, int, int, int]:
    """A table ``(batch | 1, heads | 1, entries)`` four times, each a step further, and the steps of
    batch, heads and copies.
    """
    batch, heads, length = table.shape
    room = -(-length // 16) * 16
    copies = table.new_zeros(batch, heads, 4, room)
    for copy in range(4):
        copies[:, :, copy, : max(length - copy, 0)] = table[:, :, copy:]
    head = 0 if heads == 1 else 4 * room
    return copies, 0 if batch == 1 else heads * 4 * room, head, room


@triton.jit
def row_tile(t, b, h, j, jm):
    return tl.load(t.data + b * t.batch + h * t.head + j[None, :], mask=jm[None, :], other=0.0)


@triton.jit
def strip_tile(t, b, h, i, j, im, jm, n):
    back = n - 1 - i
    copy = back & 3
    # Read four at a time: entry by entry a tile of them costs as much as its softmax.
    row = tl.multiple_of(copy * t.copy + (back - copy), 4)
    seen = im[:, None] & jm[None, :]
    return tl.load(
        t.data + b * t.batch + h * t.head + (row[:, None] + j[None, :]), mask=seen, other=0.0
    )


@triton.jit
def whole_tile(t, b, h, i, j, im, jm):
    at = i.to(tl.int64)[:, None] * t.row + j[None, :] * t.col
    seen = im[:, None] & jm[None, :]
    return tl.load(t.data + b * t.batch + h * t.head + at, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def indexed_tile(t, b, h, i, j, im, jm, SOME: tl.constexpr):
    row = tl.load(t.rows + b * t.rows_batch + h * t.rows_head + i[:, None], im[:, None], other=0)
    col = tl.load(t.cols + b * t.cols_batch + h * t.cols_head + j[None, :], jm[None, :], other=0)
    at = row + col
    if SOME:
        first = t.start + tl.minimum(i, t.over) * (t.left + 1)
        at = tl.where(at < 0, first[:, None] + tl.minimum(j, t.left)[None, :], at)
    seen = im[:, None] & jm[None, :]
    return tl.load(t.data + b * t.batch + h * t.head + at, mask=seen, other=0.0)


@triton.jit
def fours_tile(t, b, h, i, j, im, jm):
    row = tl.load(t.rows + b * t.rows_batch + i, mask=im, other=0)
    col = tl.load(t.cols + j, mask=jm, other=0)
    col = tl.max_contiguous(tl.multiple_of(col, 4), 4)
    copy = row & 3
    row = tl.multiple_of(copy * t.copy + (row - copy), 4)
    seen = im[:, None] & jm[None, :]
    return tl.load(
        t.data + b * t.batch + h * t.head + (row[:, None] + col[None, :]), mask=seen, other=0.0
    )


@triton.jit
def spread_tile(t, b, h, i, j, im, jm, n):
    seen = im[:, None] & jm[None, :]
    at = tl.load(t.index + (j[None, :] - i[:, None] + (n - 1)), mask=seen, other=0)
    return tl.load(
        t.data + b * t.batch + h * t.head + (i[:, None] * t.row + at), mask=seen, other=0.0
    )


@triton.jit
def same_tile(t, b, i, j, im, jm):
    row = tl.load(t.rows + b * t.rows_batch + i, mask=im, other=0)
    col = tl.load(t.cols + b * t.cols_batch + j, mask=jm, other=0)
    return row[:, None] == col[None, :]


@triton.jit
def box_tile(t, KIND: tl.constexpr, i, j, im, jm):
    seen = True
    for d in tl.static_range(len(KIND) - 2):
        if KIND[1]:
            first = tl.load(t.first + d * t.edge + j, mask=jm, other=0)[None, :]
            wide = tl.load(t.wide + d * t.edge + j, mask=jm, other=0)[None, :]
            cell = tl.load(t.cell + d * t.cells + i, mask=im, other=0)[:, None]
        else:
            first = tl.load(t.first + d * t.edge + i, mask=im, other=0)[:, None]
            wide = tl.load(t.wide + d * t.edge + i, mask=im, other=0)[:, None]
            cell = tl.load(t.cell + d * t.cells + j, mask=jm, other=0)[None, :]
        # Without a sign, what is before the first is far beyond the last.
        step = (cell - first).to(tl.uint32)
        seen = seen & (step <= wide.to(tl.uint32))
        if KIND[2 + d] > 1:
            seen = seen & (step % KIND[2 + d] == 0)
    return seen


@triton.jit
def add_terms(s, terms, KINDS: tl.constexpr, b, h, i, j, im, jm, n):
    """A tile of scores plus the entries of all terms.

    s ``(rows, keys)`` float32; b, h: batch element and head, 64-bit; i, j: places of rows and
    keys, im, jm: which of them are there; n: number of queries. h is a number, or a column
    ``(rows, 1)`` where rows belong to several heads (decoding): a tile function that reads
    ``h * t.head + i[:, None] ...`` serves both.
    """
    for k in tl.static_range(len(KINDS)):
        if KINDS[k] == "row":
            s += row_tile(terms[k], b, h, j, jm)
        elif KINDS[k] == "strip":
            s += strip_tile(terms[k], b, h, i, j, im, jm, n)
        elif KINDS[k] == "whole":
            s += whole_tile(terms[k], b, h, i, j, im, jm)
        elif KINDS[k] == "indexed":
            s += indexed_tile(terms[k], b, h, i, j, im, jm, False)
        elif KINDS[k] == "indexed_some":
            s += indexed_tile(terms[k], b, h, i, j, im, jm, True)
        elif KINDS[k] == "fours":
            s += fours_tile(terms[k], b, h, i, j, im, jm)
        elif KINDS[k] == "spread":
            s += spread_tile(terms[k], b, h, i, j, im, jm, n)
        elif KINDS[k] == "same":
            s = tl.where(same_tile(terms[k], b, i, j, im, jm), s, float("-inf"))
        elif KINDS[k][0] == "box":
            s = tl.where(box_tile(terms[k], KINDS[k], i, j, im, jm), s, float("-inf"))
        elif KINDS[k][0] == "points":
            s = add_points(s, terms[k], KINDS[k], b, h, i, j, im, jm)
    return s
