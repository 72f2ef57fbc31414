"""Two kernels that do nothing but exponentials, or multiply and add: what a card can do of them."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def exponentials(out: Any, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (at % 1024).to(tl.float32) * 1e-3
    for _ in range(COUNT):
        x = tl.exp2(-x)  # stays between a half and one, and each needs the one before
    tl.store(out + at, x)


@triton.jit  # type: ignore[untyped-decorator]
def products(out: Any, COUNT: tl.constexpr, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (at % 1024).to(tl.float32) * 1e-3
    for _ in range(COUNT):
        x = x * 0.5 + 0.25
    tl.store(out + at, x)
