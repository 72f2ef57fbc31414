"""Numbers on keys by token position: what lasts longer than one call, in any cache."""

from __future__ import annotations

import torch
from torch import Tensor


def to_positions(values: Tensor, positions: Tensor, length: int | None = None) -> Tensor:
    """Numbers on keys ``(batch, heads, keys)`` in the order of token positions, 0 where none is.

    Args:
        values: the numbers. positions: ``(batch | 1, keys)``, -1 where there is no token.
        length: positions of the result; by default one more than the largest.
    """
    where = positions.expand(values.shape[0], -1)
    if length is None:
        length = int(where.max()) + 1 if where.numel() else 0
    # Keys without a token all write to one place more, which is dropped.
    index = torch.where((where < 0) | (where >= length), length, where)[:, None]
    table = values.new_zeros(*values.shape[:2], length + 1)
    return table.scatter(2, index.expand_as(values), values)[..., :-1]


def at_positions(table: Tensor, positions: Tensor) -> Tensor:
    """The inverse: ``(batch, heads, length)`` at `positions` ``(batch | 1, keys)``, 0 elsewhere."""
    batch, heads, length = table.shape
    where = positions.expand(batch, -1)
    if not length:
        return table.new_zeros(batch, heads, where.shape[1])
    index = where.clamp(0, length - 1)[:, None].expand(-1, heads, -1)
    inside = (where >= 0) & (where < length)
    return table.gather(2, index).masked_fill(~inside[:, None], 0)


def together(one: Tensor, other: Tensor | None) -> Tensor:
    """The sum (for marks: either) of two tables, as long as the longer."""
    if other is None:
        return one
    length = max(one.shape[2], other.shape[2])
    one, other = (torch.nn.functional.pad(t, (0, length - t.shape[2])) for t in (one, other))
    return one | other if one.dtype == torch.bool else one + other
