"""Tile sizes, warps and stages of each kernel, by card, format and head sizes.

Chosen so that no kernel of `attnbias.kernels.offline` keeps registers in memory and each fits the
shared memory of its card, as read from the compiled code: benchmarks/results/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnbias import kernels


@dataclass(frozen=True)
class Config:
    """rows, cols: queries and keys of a tile; warps and stages: what Triton calls num_warps and
    num_stages; precision: how float32 products are made.
    """

    rows: int
    cols: int
    warps: int
    stages: int
    precision: str

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def power(size: int, least: int = 16) -> int:
    """The power of two, at least `least`, that holds a size."""
    return max(least, 1 << max(size - 1, 0).bit_length())


def halves(size: int) -> tuple[int, int]:
    """Two powers of two that hold a size together, the second 0 where one is no larger: 64 and 16
    for 72 or 80, 64 and 32 for 96, 128 and 64 for 192.
    """
    whole = power(size)
    rest = power(size - whole // 2)
    return (whole // 2, rest) if whole > 16 and whole // 2 + rest < whole else (whole, 0)


def precision(dtype: torch.dtype) -> str:
    """How products of a format are made: float32 from three products of TF32 on NVIDIA's cards."""
    if kernels.interpreted() or dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32x3"


def card() -> tuple[str, int]:
    """``("cuda", 90)``, ``("hip", 942)``: what kernels are compiled for now."""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    digits = "".join(c for c in str(target.arch) if c.isdigit())
    return target.backend, int(digits or 0)


def choose(kernel: str, dtype: torch.dtype, size: int, width: int, rank: int) -> Config:
    """The configuration of a kernel ("forward", ...) for head sizes and columns of factors."""
    if kernels.interpreted():
        return Config(32, 32, 4, 1, "ieee")
    wide = max(sum(halves(size)), sum(halves(width)))
    how = precision(dtype)
    if dtype == torch.float32:
        return Config(64, 32, 4, 2, how)
    if wide <= 64:
        return Config(128, 64, 4, 3, how)
    if wide <= 128:
        return Config(128, 64, 8, 2, how)
    return Config(64, 32, 8, 2, how)
