"""Distances of the diagonals of a problem."""

from __future__ import annotations

import torch
from torch import Tensor


def distances(
    queries: int, keys: int, offset: int, device: torch.device | str | None = None
) -> Tensor:
    """``key position - query position`` of each entry of a `Relative` table, integers.

    Entry ``x`` is the diagonal ``j - i = x - (queries - 1)``; query 0 stands at position `offset`.
    """
    return torch.arange(1 - queries, max(keys, 1 - queries), device=device) - offset
