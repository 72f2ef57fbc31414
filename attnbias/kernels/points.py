"""What a `Distance` is to a kernel: places of queries and keys, and a function of how far apart.

A term is a `Points`, its kind the constant tuple ``("points", metric, axes, split, squared, form,
bases, causal, weighted)``:

- metric "euclidean", "sphere" (unit vectors) or "time"; axes: coordinates of a point;
- split: coordinates have a high and a low part each, together what float64 holds. The difference of
  the high parts is exact where they are close, so that close points (and antipodes) keep all
  digits of float32;
- squared: the function reads the square of the distance;
- form "linear", "exponential" or "bell" with so many bases, or a table with so many intervals:
  "table", read where it lies, or "chip", read from shared memory;
- weighted: 1 a factor of each query, 2 of each key, 3 both.

The formulas are those of the compiled loops (`attnbias.native.radial`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Points(NamedTuple):
    """Tensors and their steps (0 broadcasts), all float32.

    x ``[b, axis, i]``, y ``[b, axis, j]``: the high parts of all axes, then the low parts. query
    ``[b, h, i]``, other ``[b, h, j]``: factors of queries and keys. a, b, c ``[h, basis]``: height,
    ``-b log2 e``, middle; of a table a ``[h, interval]`` its values and b what they rise by, low
    and per_unit: where it begins, intervals for each unit of distance.
    """

    x: Any
    x_batch: Any
    x_axis: Any
    y: Any
    y_batch: Any
    y_axis: Any
    query: Any
    query_batch: Any
    query_head: Any
    other: Any
    other_batch: Any
    other_head: Any
    a: Any
    b: Any
    c: Any
    head: Any
    low: Any
    per_unit: Any


@triton.jit
def arc(near, far):
    """The angle between unit vectors from the squares of ``|u - v|`` and ``|u + v|``.

    ``2 atan(|u - v| / |u + v|)``; the arctangent of the smaller over the larger one is a polynomial
    with an error below 2e-7, after a turn by an eighth where they are of like size.
    """
    one = tl.sqrt(near)
    two = tl.sqrt(far)
    less = tl.minimum(one, two)
    more = tl.maximum(tl.maximum(one, two), 1e-30)  # rows that are not there have no vector
    turned = less > 0.414213562 * more
    z = tl.where(turned, less - more, less) / tl.where(turned, less + more, more)
    s = z * z
    p = s * 8.05374449538e-2 - 1.38776856032e-1
    p = p * s + 1.99777106478e-1
    p = p * s - 3.33329491539e-1
    angle = p * s * z + z
    angle = tl.where(turned, angle + 0.785398163, angle)
    angle = tl.where(one > two, 1.57079632679 - angle, angle)
    return angle + angle


@triton.jit
def step_of(t, KIND: tl.constexpr, b, i, j, im, jm, axis):
    """Differences of one coordinate ``x_i - y_j`` and, on the sphere, sums (else zero)."""
    AXES: tl.constexpr = KIND[2]
    x = t.x + b * t.x_batch + i
    y = t.y + b * t.y_batch + j
    one = tl.load(x + axis * t.x_axis, mask=im, other=0.0)[:, None]
    two = tl.load(y + axis * t.y_axis, mask=jm, other=0.0)[None, :]
    step = one - two
    side = 0.0
    if KIND[1] == "sphere":
        side = one + two
    if KIND[3]:
        one = tl.load(x + (AXES + axis) * t.x_axis, mask=im, other=0.0)[:, None]
        two = tl.load(y + (AXES + axis) * t.y_axis, mask=jm, other=0.0)[None, :]
        step += one - two
        if KIND[1] == "sphere":
            side += one + two
    return step, side


@triton.jit
def measure(t, KIND: tl.constexpr, b, i, j, im, jm):
    """Distances (or squares) of a tile, zero where there is none, where there is one, and the
    squares that they are made of: ``|x - y|^2`` and, on the sphere, ``|x + y|^2``.
    """
    AXES: tl.constexpr = KIND[2]
    step, side = step_of(t, KIND, b, i, j, im, jm, 0)
    near = step * step
    far = side * side
    if KIND[1] == "time":
        there = tl.abs(step) < float("inf")
        if KIND[7]:
            there = there & (step >= 0.0)
        q = near if KIND[4] else step
    else:
        for axis in tl.static_range(1, AXES):
            step, side = step_of(t, KIND, b, i, j, im, jm, axis)
            near += step * step
            far += side * side
        there = near < float("inf")
        if KIND[1] == "sphere":
            q = arc(near, far)
            q = q * q if KIND[4] else q
        else:
            q = near if KIND[4] else tl.sqrt(near)
    return tl.where(there, q, 0.0), there, near, far


@triton.jit
def basis(q, t, KIND: tl.constexpr, h, f):
    """One exponential of the function, without its height, and the distance to its middle."""
    at = h * t.head + f
    fall = tl.load(t.b + at)
    step = q
    if KIND[5] == "bell":
        step = q - tl.load(t.c + at)
        bell = tl.exp2(step * step * fall)
    else:
        bell = tl.exp2(q * fall)
    return bell, step


@triton.jit
def radial(q, t, KIND: tl.constexpr, h):
    """The function of one head at distances ``q``."""
    FORM: tl.constexpr = KIND[5]
    BASES: tl.constexpr = KIND[6]
    if FORM == "linear":
        made = q * tl.load(t.a + h * t.head)
    elif FORM == "table" or FORM == "chip":
        place = (q - t.low) * t.per_unit
        place = tl.minimum(tl.maximum(place, 0.0), BASES * 1.0)
        node = tl.minimum(place.to(tl.int32), BASES - 1)
        part = place - node.to(tl.float32)
        # Rows of several heads read several tables, which have no room on chip.
        if FORM == "table" or len(h.shape) > 0:
            first = tl.load(t.a + h * t.head + node)
            rise = tl.load(t.b + h * t.head + node)
        else:
            nodes = h * t.head + tl.arange(0, BASES)
            spread = tl.reshape(node, (node.shape[0] * node.shape[1],))
            first = tl.reshape(tl.gather(tl.load(t.a + nodes), spread, 0), node.shape)
            rise = tl.reshape(tl.gather(tl.load(t.b + nodes), spread, 0), node.shape)
        made = first + part * rise
    else:
        made = tl.zeros_like(q)
        for f in tl.static_range(BASES):
            bell, _ = basis(q, t, KIND, h, f)
            made += bell * tl.load(t.a + h * t.head + f)
    return made


@triton.jit
def query_factor(t, b, h, i, im):
    """The factor of each query ``(rows, 1)``."""
    at = t.query + b * t.query_batch + h * t.query_head + i[:, None]
    return tl.load(at, mask=im[:, None], other=0.0)


@triton.jit
def key_factor(t, b, h, j, jm):
    """The factor of each key ``(1, keys)``, or one line for each row where `h` is a column."""
    at = t.other + b * t.other_batch + h * t.other_head + j[None, :]
    return tl.load(at, mask=jm[None, :], other=0.0)


@triton.jit
def add_points(s, t, KIND: tl.constexpr, b, h, i, j, im, jm):
    """A tile of scores plus the entries; minus infinity where there is no distance. h: a number, or
    a column ``(rows, 1)``.
    """
    q, there, _, _ = measure(t, KIND, b, i, j, im, jm)
    made = radial(q, t, KIND, h)
    if KIND[8] % 2 == 1:
        made *= query_factor(t, b, h, i, im)
    if KIND[8] >= 2:
        made *= key_factor(t, b, h, j, jm)
    return tl.where(there, s + made, float("-inf"))
