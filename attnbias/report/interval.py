"""Intervals by bootstrap: over blocks of query positions for a head, over heads for a word."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = 16
SHORTEST = 4  # query positions in a block; fewer than FEWEST blocks give no interval
FEWEST = 4
DRAWS = 1000
LEVEL = 0.95


def blocks(queries: int) -> int:
    """How many blocks a text of so many query positions is cut into; 0 gives no interval."""
    found = min(BLOCKS, queries // SHORTEST)
    return found if found >= FEWEST else 0


def over_queries(values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The ends (...,) of the 95% interval of the mean of `values` (..., queries).

    Neighbouring queries attend alike, so whole blocks of neighbours are drawn with replacement
    (DRAWS times) and the 2.5% and 97.5% quantiles of the means are given. NaN entries are left out.
    """
    count = blocks(values.shape[-1])
    if count == 0:
        gone = torch.full(values.shape[:-1], torch.nan, dtype=torch.float64)
        return gone, gone
    parts = torch.tensor_split(values.double(), count, -1)
    sums = torch.stack([part.nansum(-1) for part in parts], -1)
    known = torch.stack([(~part.isnan()).sum(-1) for part in parts], -1).double()
    weight = _draws(count, seed)
    return _ends((sums @ weight) / (known @ weight))


def over_rows(values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The ends (words,) of the 95% interval of the mean over rows of `values` (rows, words)."""
    weight = _draws(len(values), seed) / len(values)
    return _ends(values.double().T @ weight)


def _draws(count: int, seed: int) -> Tensor:
    """(count, DRAWS): how often each block is in each draw."""
    made = torch.Generator().manual_seed(seed)
    chosen = torch.randint(count, (DRAWS, count), generator=made)
    return torch.nn.functional.one_hot(chosen, count).sum(1).double().T


def _ends(means: Tensor) -> tuple[Tensor, Tensor]:
    tail = (1 - LEVEL) / 2
    low, high = torch.nanquantile(means, means.new_tensor([tail, 1 - tail]), dim=-1)
    return low, high
