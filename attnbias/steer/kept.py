"""What is known of keys beyond the call that made it: kept by token position, not by slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """A value or mark per token position: ``(batch, heads | 1, positions)``; 0 where none is known.

    The cache of a sliding window moves its keys to other slots, a static one has slots that are not
    written yet, and a chunk of a prompt brings only its own tokens; positions stay.
    """

    table: Tensor

    @classmethod
    def of(cls, values: Tensor, positions: Tensor) -> Kept:
        """Values at tokens ``(batch, heads | 1, tokens)`` whose `positions` ``(batch | 1, tokens)``
        are; what has no token (position -1) is left out.
        """
        where = positions.expand(values.shape[0], -1)
        length = max(int(where.max()), -1) + 1 if where.numel() else 0
        # Whatever has no token is written to one place more, which is dropped.
        table = values.new_zeros(*values.shape[:2], length + 1)
        index = torch.where(where < 0, length, where)[:, None].expand_as(values)
        return cls(table.scatter(2, index, values)[..., :length])

    def with_(self, other: Kept | None) -> Kept:
        """The sum (for marks: either) of two, as long as the longer."""
        if other is None:
            return self
        length = max(self.table.shape[2], other.table.shape[2])
        one, two = (
            torch.nn.functional.pad(t, (0, length - t.shape[2])) for t in (self.table, other.table)
        )
        return Kept(one | two if one.dtype == torch.bool else one + two)

    def at(self, positions: Tensor) -> Tensor:
        """The values at `positions` ``(batch | 1, keys)``: ``(batch, heads | 1, keys)``."""
        batch, heads, length = self.table.shape
        where = positions.expand(batch, -1)
        index = where.clamp(0, max(length - 1, 0))[:, None].expand(-1, heads, -1)
        table = self.table if length else self.table.new_zeros(batch, heads, 1)
        inside = ((where >= 0) & (where < length))[:, None]
        return torch.where(inside, table.gather(2, index), torch.zeros_like(table[..., :1]))
