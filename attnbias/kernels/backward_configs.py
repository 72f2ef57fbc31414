"""Tile sizes, warps and stages of the backward kernels."""

from __future__ import annotations

import torch

from attnbias import kernels
from attnbias.kernels.configs import Config, halves


def keys(dtype: torch.dtype, size: int, width: int, rank: int) -> Config:
    """Of `backward_keys.keys_pass`: rows are the queries of a tile, columns the keys it owns."""
    if kernels.interpreted():
        return Config(32, 32, 4, 1, "ieee")
    wide = max(sum(halves(size)), sum(halves(width)))
    if dtype == torch.float32:
        return Config(32, 32, 4, 1, _products())
    if wide <= 64:
        return Config(64, 128, 8, 2, _products())
    return Config(32, 64, 4 if wide <= 128 else 8, 2, _products())


def queries(dtype: torch.dtype, size: int, width: int, rank: int, line: bool) -> Config:
    """Of `backward_queries.queries_pass`; `line`: with sums over diagonals."""
    if kernels.interpreted():
        return Config(32, 32, 4, 1, "ieee")
    wide = max(sum(halves(size)), sum(halves(width)))
    if dtype == torch.float32:
        return Config(32, 32, 4, 1, _products())
    if wide <= 64:
        return Config(128, 64, 8, 2, _products())
    return Config(64, 32, 4 if wide <= 128 else 8, 2, _products())


def _products() -> str:
    """How float32 tensors are multiplied, whatever the format of the queries."""
    return "tf32x3" if torch.version.hip is None else "ieee"


__all__ = ["keys", "queries"]
