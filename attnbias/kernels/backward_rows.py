"""Ranges of keys turned round: which queries see a block of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbias.kernels.backward import Rows
from attnbias.kernels.launch import Given


def rows_of_blocks(given: Given, cols: int, m: int) -> Rows | None:
    """Which queries see each block of keys, from the keys that each query sees.

    Exact where ranges move to the right with the query. Else what holds all that see a key: from
    the first query by which some range has reached the block to the last one from which on some
    range begins before its end; and some of those that see the whole block, by the same envelopes
    from inside. Queries that see nothing may lie in either: their weights are 0 without a mask.
    """
    if not given.ranges:
        return None
    first, last = given.places.first, given.places.last
    nothing = last <= first
    starts = torch.arange(0, m, cols, device=first.device, dtype=first.dtype)
    starts = starts.expand(*first.shape[:-1], -1).contiguous()
    ends = (starts + cols).clamp_(max=m)

    def count(line: Tensor, at: Tensor) -> Tensor:
        """How many entries of a line that never falls are at most `at`."""
        return torch.searchsorted(line.contiguous(), at, right=True, out_int32=True)

    return Rows(
        count(last.masked_fill(nothing, 0).cummax(-1).values, starts),
        count(_least_after(first.masked_fill(nothing, m)), ends - 1),
        count(_least_after(last.masked_fill(nothing, m)), ends - 1),
        count(first.masked_fill(nothing, 0).cummax(-1).values, starts),
        starts.shape[-1] if given.places.batch else 0,
    )


def _least_after(line: Tensor) -> Tensor:
    """The least of each entry and all that follow."""
    return line.flip(-1).cummin(-1).values.flip(-1)


__all__ = ["rows_of_blocks"]
