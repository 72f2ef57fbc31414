"""Marks on keys that outlast the call which made them: kept by token position, not by slot."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Marks:
    """Which token positions are marked: bool ``(batch, heads | 1, positions)``.

    A cache of a sliding window moves its keys to other slots, and a static one has slots that are
    not written yet; positions stay.
    """

    table: Tensor

    @classmethod
    def of(cls, marked: Tensor, positions: Tensor) -> Marks:
        """From marks on keys ``(batch, heads | 1, keys)`` at `positions` ``(batch | 1, keys)``."""
        where = positions.expand(marked.shape[0], -1)
        length = int(where.max()) + 1 if where.numel() else 0
        # Keys without a token all write to one place more, which is dropped.
        table = marked.new_zeros(*marked.shape[:2], max(length, 0) + 1)
        index = torch.where(where < 0, length, where)[:, None].expand_as(marked)
        return cls(table.scatter(2, index, marked)[..., :-1])

    def at(self, positions: Tensor) -> Tensor:
        """The marks at `positions` ``(batch | 1, keys)``: ``(batch, heads | 1, keys)``.

        False for positions that came later and for keys without a token.
        """
        batch, heads, length = self.table.shape
        if not length:
            return self.table.new_zeros(batch, heads, positions.shape[1])
        where = positions.expand(batch, -1)
        inside = (where >= 0) & (where < length)
        index = where.clamp(0, length - 1)[:, None].expand(-1, heads, -1)
        return self.table.gather(2, index) & inside[:, None]
