"""Tile sizes, warps and stages of each kernel, by card, format and head sizes.

Chosen so that no kernel of `attnbias.kernels.offline` keeps registers in memory and each fits the
shared memory of its card, as read from the compiled code: benchmarks/results/kernels.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnbias import kernels
from attnbias.kernels.kinds import Kind

HOPPER = (90,)
BLACKWELL = (100, 103)
SMALL = (86, 89, 120, 121)  # cards with 99 kB of shared memory


@dataclass(frozen=True)
class Config:
    """rows, cols: queries and keys of a tile; warps and stages: what Triton calls num_warps and
    num_stages; precision: how float32 products are made; chunk: features of queries and keys that
    are multiplied at a time, read again for every tile, where a whole head would not stay in the
    registers (0: it does).
    """

    rows: int
    cols: int
    warps: int
    stages: int
    precision: str
    chunk: int = 0

    def options(self) -> dict[str, int]:
        # Products and sums are fused whatever the release of Triton does by default.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


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
    """How float32 is multiplied, as operand or beside half formats: in three products of TF32 on
    NVIDIA's cards.
    """
    return "ieee" if kernels.interpreted() or torch.version.hip is not None else "tf32x3"


def card() -> tuple[str, int]:
    """``("cuda", 90)``, ``("hip", 942)``: what kernels are compiled for now."""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    digits = "".join(c for c in str(target.arch) if c.isdigit())
    return target.backend, int(digits or 0)


def choose(
    kernel: str, dtype: torch.dtype, size: int, width: int, rank: int, tiles: int = 0
) -> Config:
    """The configuration of a kernel ("forward", ...) for head sizes and columns of factors.

    tiles: how many terms have an entry for every pair of query and key, which take registers, and
    shared memory where they are fetched ahead (`weight`).
    """
    wide = max(sum(halves(size)), sum(halves(width)))
    if kernels.interpreted():
        return Config(32, 32, 4, 1, "ieee", 32 if wide > 128 else 0)
    backend, number = card()
    small = number in SMALL
    full = dtype == torch.float32
    chunk = 0
    if kernel == "decode":
        rows, cols, warps, stages = _decode(wide, full, backend)
        chunk = 32 if full and wide > 64 else 0
    elif kernel != "forward":
        rows, cols, warps, stages = _plain(wide, full, backend)
    elif backend == "hip":
        rows, cols, warps, stages = _amd(wide, full)
    elif full:
        old = number < 90 and rank + tiles > 0 and 64 < wide <= 128
        rows, cols, warps, stages = (32, 32, 4, 2) if old else _full(wide)
        chunk = 16 if wide > 64 else 0 if number in HOPPER else 32
    else:
        mma = small or number < 90  # products of a warp, not of four
        rows, cols, warps, stages = _half(wide, mma, small or rank > 0 or tiles > 0, tiles)
        stages = 2 if small else stages
        if small and number >= 120 and tiles:
            cols = 32
        if number in BLACKWELL and tiles and wide <= 64:
            cols, stages = 64, 2
        chunk = 64 if wide > 128 and mma else 0
    return Config(rows, cols, warps, stages, precision(dtype), chunk)


Sizes = tuple[int, int, int, int]


def weight(kind: object) -> int:
    """How many terms that are read from a matrix take as many registers as a term of a kind."""
    if kind == "row":
        return 0
    dilated = isinstance(kind, Kind) and kind[0] == "box" and max(kind.parts[2:]) > 1
    return 2 if dilated or kind in ("spread", "indexed_some") else 1


def _half(wide: int, mma: bool, more: bool, tiles: int) -> Sizes:
    if mma:
        if wide <= 64:
            return (128, 32, 8, 2) if tiles > 1 else (128, 64, 8, 2) if more else (128, 64, 4, 3)
        return (128, 32, 8, 3) if wide <= 128 else (64, 32, 8, 2)
    if tiles > 1 and wide <= 128:
        return (128, 64, 8, 2) if wide <= 64 else (64, 64, 8, 2)
    if wide <= 64:
        return 128, 128, 8, 2 if tiles else 3
    if wide <= 128:
        return (128, 64, 8, 2) if more else (128, 128, 8, 3)
    return 128, 32, 8, 2


def _full(wide: int) -> Sizes:
    return (64, 32, 4, 2) if wide <= 128 else (32, 16, 4, 1)


def _amd(wide: int, full: bool) -> Sizes:
    if full:
        return 64 if wide <= 64 else 32, 32, 4, 1
    return (128, 64, 4, 1) if wide <= 128 else (64, 32, 4, 1)


def _plain(wide: int, full: bool, backend: str) -> Sizes:
    stages = 1 if backend == "hip" else 2
    if full:
        return 32, 32, 4, stages
    return 64, 64 if wide <= 128 else 32, 4, stages


def _decode(wide: int, full: bool, backend: str) -> Sizes:
    stages = 1 if backend == "hip" else 2
    if full and wide > 128:
        return 16, 32, 8, 1
    return 16, 64 if wide <= 128 and not full else 32, 4, stages
