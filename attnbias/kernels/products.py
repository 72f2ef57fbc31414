"""Products of tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from attnbias import kernels

INTERPRETED = tl.constexpr(kernels.interpreted())


@triton.jit
def dot(x, y, PRECISION: tl.constexpr):
    """``x y`` in float32, of any format."""
    if INTERPRETED:  # the interpreter would multiply the bits of bfloat16 as integers
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision=PRECISION)


@triton.jit
def add_dot(total, x, y, PRECISION: tl.constexpr):
    """``total + x y``."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc=total, input_precision=PRECISION)
