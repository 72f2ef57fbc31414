"""Tile sizes, warps and stages of the backward kernels.

Chosen from compiled code as those of `configs` are: the largest tiles whose registers are not kept
in memory, or hardly, and whose shared memory fits the card. None was timed yet.
"""

from __future__ import annotations

import torch

from attnbias import kernels
from attnbias.kernels.configs import Config, card, halves

SMALL = (75, 86, 87, 89, 120, 121)  # NVIDIA's cards with 99 kB of shared memory or less

Sizes = tuple[int, int, int, int, int]  # rows, columns, warps, stages, chunk


def keys(dtype: torch.dtype, size: int, width: int, rank: int, drops: bool) -> Config:
    """Of `backward_keys.keys_pass`: rows are the queries of a tile, columns the keys it owns;
    `drops`: with dropout, whose hashes take registers.
    """
    wide = max(sum(halves(size)), sum(halves(width)))
    if kernels.interpreted():
        return _interpreted(wide)
    backend, _ = card()
    if dtype == torch.float32:
        found: Sizes = (32 if wide <= 64 and not rank else 16, 32, 4 if wide <= 128 else 8, 1, 32)
    elif wide <= 64:
        found = (64, 128, 8, 2, 0) if backend == "cuda" and not drops else (32, 128, 8, 2, 0)
    elif wide <= 128:
        found = (32, 128, 8, 2, 0) if backend == "cuda" else (32, 64, 4, 2, 0)
    else:
        found = (32, 64, 8, 2, 64)
    return _config(found)


def queries(
    dtype: torch.dtype, size: int, width: int, rank: int, line: bool, drops: bool
) -> Config:
    """Of `backward_queries.queries_pass`; `line`: with sums over diagonals, where rows are at most
    twice the columns.
    """
    wide = max(sum(halves(size)), sum(halves(width)))
    if kernels.interpreted():
        return _interpreted(wide)
    backend, number = card()
    large = backend == "cuda" and number >= 90 and number not in SMALL
    if dtype == torch.float32:
        found: Sizes = (32, 64, 8, 1, 32)
        if rank or wide > 128:
            found = (16, 32, 4 if wide <= 128 else 8, 1, 32)
    elif wide <= 64 and line:
        found = (128, 64, 8, 2, 0) if large and not drops else (64, 64, 8, 1, 0)
    elif wide <= 64:
        found = (128, 64, 8, 2, 0) if large and not rank and not drops else (128, 32, 8, 2, 0)
    elif wide <= 128:
        light = large and number < 100 and not rank and not line and not drops
        found = (128, 32, 8, 2, 0) if light else (64, 32, 8, 1, 0)
    else:
        found = (32, 64, 8, 2, 64)
    return _config(found)


def _interpreted(wide: int) -> Config:
    return Config(32, 32, 4, 1, "ieee", 32 if wide > 128 else 0)


def _config(sizes: Sizes) -> Config:
    """Float32 tensors are multiplied alike whatever the format of the queries."""
    backend, number = card()
    rows, cols, warps, stages, chunk = sizes
    precision = "tf32x3" if backend == "cuda" else "ieee"
    return Config(rows, cols, warps, 1 if number in SMALL else stages, precision, chunk)


__all__ = ["keys", "queries"]
