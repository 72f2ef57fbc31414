"""Gradients to what a `Points` term stores, summed on chip while a program goes through its tiles.

A program that owns queries calls `start_rows`, for each tile `add_rows` with the gradient of the
scores, and at its end `store_rows`: sums to the parameters of the function (of this program alone,
to be added up in the order of the programs), to the factors of its queries, and to their places. A
program that owns keys does the same with `start_cols`, `add_cols`, `store_cols` for the places of
its keys. Nothing is written by two programs.

WANTED has a number for each term: 1 parameters and factors of queries, 2 places of queries, 4
places of keys, or a sum of these; 0 nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attnbias.kernels.points import basis, key_factor, measure, query_factor, step_of

LN2 = tl.constexpr(0.6931471805599453)


class Slots(NamedTuple):
    """Where the sums of a term go: parts ``[b, h, block, sum]``, query ``[b, h, i]``, x ``[b, h,
    axis, i]`` and y ``[b, group, axis, j]``, all float32 and contiguous; not wanted: not touched.
    """

    parts: Any
    query: Any
    x: Any
    y: Any


@triton.jit
def rate(q, near, far, KIND: tl.constexpr):
    """The slope of the distance (or square) along a coordinate, over the difference in it; zero at
    a corner. Not for time.
    """
    if KIND[1] == "sphere":
        sine = 0.5 * tl.sqrt(near * far)
        at = tl.where(sine > 0.0, sine, 1.0)
        if KIND[4]:
            # The square has no corner where two points meet, but one at the antipode.
            made = tl.where(sine > 0.0, 2.0 * tl.sqrt(q) / at, tl.where(far > 0.0, 2.0, 0.0))
        else:
            made = tl.where(sine > 0.0, 1.0 / at, 0.0)
    elif KIND[4]:
        made = tl.full(q.shape, 2.0, tl.float32)
    else:
        made = tl.where(q > 0.0, 1.0 / tl.where(q > 0.0, q, 1.0), 0.0)
    return made


@triton.jit
def move(slope, t, KIND: tl.constexpr, b, i, j, im, jm, axis):
    """The share of each entry in the gradient to one coordinate of a query; minus that: of the
    key.
    """
    step, _ = step_of(t, KIND, b, i, j, im, jm, axis)
    if KIND[1] == "time":
        made = slope * 2.0 * step if KIND[4] else slope
    else:
        made = slope * step
    # A place that is missing: zero times NaN is meant to be zero.
    return tl.where(slope != 0.0, made, 0.0)


@triton.jit
def zeros(COUNT: tl.constexpr, SIZE: tl.constexpr):
    made = ()
    for _ in tl.static_range(COUNT):
        made += (tl.zeros((SIZE,), tl.float32),)
    return made


@triton.jit
def start_rows_one(KIND: tl.constexpr, WANTED: tl.constexpr, ROWS: tl.constexpr):
    PER: tl.constexpr = 1 if KIND[5] == "linear" else (3 if KIND[5] == "bell" else 2)
    COUNT: tl.constexpr = WANTED % 2 * PER * KIND[6] + WANTED // 2 % 2 * KIND[2]
    return zeros(COUNT, ROWS)


@triton.jit
def start_rows(KINDS: tl.constexpr, WANTED: tl.constexpr, ROWS: tl.constexpr):
    """A tuple of sums for each term: of parameters basis by basis, then of coordinates."""
    made = ()
    for k in tl.static_range(len(KINDS)):
        if WANTED[k] % 4 == 0:
            made += ((),)
        else:
            made += (start_rows_one(KINDS[k], WANTED[k], ROWS),)
    return made


@triton.jit
def add_rows_one(own, ds, t, KIND: tl.constexpr, WANTED: tl.constexpr, b, h, i, j, im, jm):
    q, there, near, far = measure(t, KIND, b, i, j, im, jm)
    g = tl.where(there, ds, 0.0)
    if KIND[8] >= 2:
        g *= key_factor(t, b, h, j, jm)
    made = ()
    if KIND[5] == "linear":
        slope = g * tl.load(t.a + h * t.head)
        if WANTED % 2 == 1:
            made += (own[0] + tl.sum(g * q, 1),)
    else:
        PER: tl.constexpr = 3 if KIND[5] == "bell" else 2
        BASES: tl.constexpr = KIND[6]
        slope = tl.zeros_like(g)
        for f in tl.static_range(BASES):
            bell, step = basis(q, t, KIND, h, f)
            part = g * bell
            push = part * step
            if WANTED % 2 == 1:
                made += (own[PER * f] + tl.sum(part, 1),)
                made += (own[PER * f + 1] + tl.sum(push, 1),)
                if KIND[5] == "bell":
                    made += (own[PER * f + 2] + tl.sum(push * step, 1),)
            at = h * t.head + f
            rise = tl.load(t.a + at) * tl.load(t.b + at) * LN2
            slope += 2.0 * rise * push if KIND[5] == "bell" else rise * part
    if WANTED // 2 % 2 == 1:
        AXES: tl.constexpr = KIND[2]
        FIRST: tl.constexpr = len(own) - AXES
        if KIND[1] != "time":
            slope *= rate(q, near, far, KIND)
        for axis in tl.static_range(AXES):
            part = move(slope, t, KIND, b, i, j, im, jm, axis)
            made += (own[FIRST + axis] + tl.sum(part, 1),)
    return made


@triton.jit
def add_rows(
    sums, ds, terms, KINDS: tl.constexpr, WANTED: tl.constexpr, b, h, i, j, im, jm
):  # fmt: skip
    """The sums with those of one tile. ds ``(rows, keys)``: zero where a score is hidden."""
    made = ()
    for k in tl.static_range(len(KINDS)):
        if WANTED[k] % 4 == 0:
            made += ((),)
        else:
            made += (add_rows_one(sums[k], ds, terms[k], KINDS[k], WANTED[k], b, h, i, j, im, jm),)
    return made


@triton.jit
def store_rows_one(
    own, slots, t, KIND: tl.constexpr, WANTED: tl.constexpr,
    b, h, unit, block, blocks, i, im, n,
):  # fmt: skip
    AXES: tl.constexpr = KIND[2]
    COUNT: tl.constexpr = len(own) - WANTED // 2 % 2 * AXES
    factor = tl.full(i.shape, 1.0, tl.float32)
    if KIND[8] % 2 == 1:
        factor = tl.sum(query_factor(t, b, h, i, im), 1)
    if WANTED % 2 == 1:
        PER: tl.constexpr = COUNT // KIND[6]
        values = tl.zeros_like(factor)
        at = slots.parts + (unit * blocks + block) * COUNT
        for f in tl.static_range(COUNT):
            sums = tl.where(im, own[f], 0.0)
            tl.store(at + f, tl.sum(sums * factor, 0))
            if f % PER == 0:
                values += sums * tl.load(t.a + h * t.head + f // PER)
        tl.store(slots.query + unit * n + i, values, mask=im)
    if WANTED // 2 % 2 == 1:
        for axis in tl.static_range(AXES):
            at = slots.x + (unit * AXES + axis) * n + i
            tl.store(at, own[COUNT + axis] * factor, mask=im)


@triton.jit
def store_rows(
    sums, slots, terms, KINDS: tl.constexpr, WANTED: tl.constexpr,
    b, h, heads, block, blocks, i, im, n,
):  # fmt: skip
    """Write the sums of a program: block of blocks, queries i."""
    for k in tl.static_range(len(KINDS)):
        if WANTED[k] % 4 != 0:
            store_rows_one(
                sums[k], slots[k], terms[k], KINDS[k], WANTED[k],
                b, h, b * heads + h, block, blocks, i, im, n,
            )  # fmt: skip


@triton.jit
def slope_of(g, q, near, far, t, KIND: tl.constexpr, h):
    """Gradients of entries to those of differences of coordinates, over these differences."""
    if KIND[5] == "linear":
        slope = g * tl.load(t.a + h * t.head)
    else:
        BASES: tl.constexpr = KIND[6]
        slope = tl.zeros_like(g)
        for f in tl.static_range(BASES):
            bell, step = basis(q, t, KIND, h, f)
            at = h * t.head + f
            rise = tl.load(t.a + at) * tl.load(t.b + at) * LN2
            slope += 2.0 * rise * step * bell if KIND[5] == "bell" else rise * bell
        slope *= g
    if KIND[1] != "time":
        slope *= rate(q, near, far, KIND)
    return slope


@triton.jit
def start_cols(KINDS: tl.constexpr, WANTED: tl.constexpr, COLS: tl.constexpr):
    """A tuple of sums for each term: of the coordinates of keys."""
    made = ()
    for k in tl.static_range(len(KINDS)):
        if WANTED[k] < 4:
            made += ((),)
        else:
            made += (zeros(KINDS[k][2], COLS),)
    return made


@triton.jit
def add_cols_one(own, ds, t, KIND: tl.constexpr, b, h, i, j, im, jm):
    q, there, near, far = measure(t, KIND, b, i, j, im, jm)
    g = tl.where(there, ds, 0.0)
    if KIND[8] % 2 == 1:
        g *= query_factor(t, b, h, i, im)
    if KIND[8] >= 2:
        g *= key_factor(t, b, h, j, jm)
    slope = slope_of(g, q, near, far, t, KIND, h)
    AXES: tl.constexpr = KIND[2]
    made = ()
    for axis in tl.static_range(AXES):
        part = move(slope, t, KIND, b, i, j, im, jm, axis)
        made += (own[axis] - tl.sum(part, 0),)
    return made


@triton.jit
def add_cols(
    sums, ds, terms, KINDS: tl.constexpr, WANTED: tl.constexpr, b, h, i, j, im, jm
):  # fmt: skip
    """The sums with those of one tile of any head. ds ``(rows, keys)``, zero where hidden."""
    made = ()
    for k in tl.static_range(len(KINDS)):
        if WANTED[k] < 4:
            made += ((),)
        else:
            made += (add_cols_one(sums[k], ds, terms[k], KINDS[k], b, h, i, j, im, jm),)
    return made


@triton.jit
def store_cols_one(own, slots, unit, j, jm, m):
    AXES: tl.constexpr = len(own)
    for axis in tl.static_range(AXES):
        tl.store(slots.y + (unit * AXES + axis) * m + j, own[axis], mask=jm)


@triton.jit
def store_cols(sums, slots, KINDS: tl.constexpr, WANTED: tl.constexpr, unit, j, jm, m):
    """Write the sums of a program; unit: batch element times groups plus group, keys j."""
    for k in tl.static_range(len(KINDS)):
        if WANTED[k] >= 4:
            store_cols_one(sums[k], slots[k], unit, j, jm, m)
