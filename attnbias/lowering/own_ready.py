"""What the loops of the compiled attention are given: tensors as flat memory with steps, keys as
panels, and of the bias what is read as it is, or strips.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.lowering import dropout, own_parts
from attnbias.lowering.nest import Buffers
from attnbias.lowering.own_parts import Parts
from attnbias.lowering.problem import Problem

Place = tuple[slice, slice, slice]  # batch elements, heads and queries


def rows_of(tensor: Tensor) -> Tensor:
    """In float32, with contiguous rows."""
    tensor = tensor.detach().float()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def flat(tensor: Tensor | None, dims: int = 3) -> tuple[Tensor, tuple[int, ...]]:
    """The memory of a tensor from its first entry on, and its steps: 0 where its size is 1."""
    if tensor is None or tensor.numel() == 0:
        return torch.empty(0), (0,) * dims
    steps = [0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    line = tensor.detach().as_strided((reach,), (1,), tensor.storage_offset())
    return line, tuple(steps[:dims])


def beside(tensor: Tensor, more: Tensor | None, width: int) -> Tensor:
    """A tensor with columns and zeros after it, up to a width."""
    parts = [tensor]
    have = tensor.shape[-1]
    if more is not None:
        parts.append(more.expand(*tensor.shape[:3], -1))
        have += more.shape[-1]
    if have < width:
        parts.append(tensor.new_zeros(1, 1, 1, 1).expand(*tensor.shape[:3], width - have))
    return torch.cat(parts, -1) if len(parts) > 1 else tensor


class Ready:
    """A problem with what the loops read: keys as panels, values of a whole number of vectors."""

    def __init__(
        self, problem: Problem, bias: Bias | None, query: Tensor, key: Tensor, value: Tensor
    ) -> None:
        from attnbias.native import attend, product

        self.lanes, self.panel = product.LANES, product.PANEL
        self.problem, self.bias = problem, bias
        self.query, self.key, self.value = (rows_of(t) for t in (query, key, value))
        self.batch, self.heads, self.n, self.size = query.shape
        self.groups, self.m, self.written = value.shape[1:]
        self.parts = parts = Parts.of(bias, self.batch, self.n, self.m)
        self.extra = 0 if parts.right is None else parts.right.shape[-1]
        # The heads that have panels of their own.
        apart = parts.right is not None and parts.right.shape[1] > 1
        self.owners = self.heads if apart else self.groups
        self.width = -(-self.written // self.lanes) * self.lanes
        self.wide = self.size + self.extra
        self.full = -(-self.m // self.panel) * self.panel
        self.value = beside(self.value, None, self.width)
        if apart and self.heads != self.groups:
            self.key = self.key.repeat_interleave(self.heads // self.groups, 1)
        self.panels = self.make_panels(attend, self.key, parts.right)
        self.keys = dropout.row_keys(problem.seed, query) if problem.dropout else None
        self.limit, self.factor = 0, 1.0
        if problem.dropout:
            self.limit = dropout.limit(problem.dropout)
            self.factor = 1.0 / (1.0 - problem.dropout)

    def make_panels(self, attend: Any, key: Tensor, more: Tensor | None) -> Tensor:
        """``(batch, heads, panels of the keys with one row for each feature)``."""
        batch, heads, m, size = key.shape
        extra = 0 if more is None else more.shape[-1]
        panels = torch.empty(batch, heads, self.full * (size + extra))
        attend.pack(*flat(key), *flat(more), panels.view(-1), (batch, heads, m, size, extra))
        return panels

    def given(self, own: Place, strip: Tensor | None, left: int) -> tuple[Any, ...]:
        """What the loops read of the bias, for some batch elements, heads and queries."""
        parts, (b, h, row) = self.parts, own

        def cut(tensor: Tensor | None, rows: bool = False) -> Tensor | None:
            if tensor is None:
                return None
            tensor = tensor[b if tensor.shape[0] > 1 else slice(None)]
            tensor = tensor[:, h if tensor.shape[1] > 1 else slice(None)]
            return tensor[:, :, row] if rows else tensor

        low, high = (t[b if len(t) > 1 else slice(None), row] for t in (parts.low, parts.high))
        if strip is not None:
            end = left + strip.shape[-1]
            low, high = low.clamp(left, end), high.clamp(left, end)
        low, high = low.contiguous(), high.contiguous()
        dense = cut(parts.dense, rows=True) if strip is None else strip
        keys = self.keys
        one, two = (
            (torch.empty(0, dtype=torch.int64),) * 2
            if keys is None
            else (t[b, h, row].reshape(-1) for t in keys)
        )
        edges = (low.view(-1), high.view(-1), 0 if len(low) == 1 else low.shape[1], one, two)
        return (
            *flat(cut(parts.left, rows=True)),
            *flat(cut(parts.table), 2),
            *flat(cut(parts.row), 2),
            *flat(dense),
            *edges,
        )

    def pieces(self, buffers: Buffers) -> Iterator[tuple[Place, Tensor | None, slice]]:
        """``(batch, heads, queries)`` and the strip of each call, with the key it starts at."""
        whole = (slice(0, self.batch), slice(0, self.heads), slice(0, self.n))
        built = None if self.bias is None else self.parts.built(self.bias)
        if built is None:
            yield whole, None, slice(0, self.m)
            return
        sizes = (self.batch, self.heads, self.n, self.m)
        for b, h, row, cols in own_parts.strips(
            built, self.parts, sizes, self.heads // self.groups
        ):
            piece = built[b, h, row, cols]
            size = (piece.batch, piece.heads, row.stop - row.start, cols.stop - cols.start)
            strip = buffers.take("strip", size, self.query).zero_()
            piece.add_to(strip)
            yield (b, h, row), strip, cols
