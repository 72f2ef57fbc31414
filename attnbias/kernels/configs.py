"""Tile sizes, warps and stages of each kernel, by card, format and head sizes."""

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


def choose(kernel: str, dtype: torch.dtype, size: int, width: int, rank: int) -> Config:
    """The configuration of a kernel ("forward", ...) for head sizes and columns of factors."""
    if kernels.interpreted():
        return Config(32, 32, 4, 1, "ieee")
    precision = "tf32x3" if torch.version.hip is None else "ieee"
    wide = max(power(size), power(width))
    if dtype == torch.float32:
        return Config(64, 32, 4, 2, precision)
    if wide <= 64:
        return Config(128, 64, 4, 3, precision)
    if wide <= 128:
        return Config(128, 64, 8, 2, precision)
    return Config(64, 32, 8, 2, precision)
