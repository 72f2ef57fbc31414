"""What a bias is to a kernel: terms that are added to a tile of scores, each from what it stores.

A kernel is given ``terms``, a tuple of the named tuples below (tensors and steps: a step of 0
broadcasts), and ``KINDS``, a constant tuple of the same length that names them. `add_terms` adds
the entries of one tile; every kernel calls it. Places are absolute: query ``i``, key ``j``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Row(NamedTuple):
    """``data[b, h, j]``: a key bias."""

    data: Any
    batch: Any
    head: Any


class Strip(NamedTuple):
    """``data[b, h, j - i + n - 1]``: the diagonals of a `Relative`."""

    data: Any
    batch: Any
    head: Any


class Whole(NamedTuple):
    """``data[b, h, i, j]`` where it lies: a `Dense`, any dimension broadcast."""

    data: Any
    batch: Any
    head: Any
    row: Any
    col: Any


@triton.jit
def row_tile(t, b, h, j, jm):
    return tl.load(t.data + b * t.batch + h * t.head + j[None, :], mask=jm[None, :], other=0.0)


@triton.jit
def strip_tile(t, b, h, i, j, im, jm, n):
    at = j[None, :] - i[:, None] + (n - 1)
    seen = im[:, None] & jm[None, :]
    return tl.load(t.data + b * t.batch + h * t.head + at, mask=seen, other=0.0)


@triton.jit
def whole_tile(t, b, h, i, j, im, jm):
    at = i.to(tl.int64)[:, None] * t.row + j[None, :] * t.col
    seen = im[:, None] & jm[None, :]
    return tl.load(t.data + b * t.batch + h * t.head + at, mask=seen, other=0.0).to(tl.float32)


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
    return s
