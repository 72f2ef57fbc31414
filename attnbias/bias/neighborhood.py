"""The mask of neighborhood attention on a grid of one to three dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnbias.bias.base import Bias, length, to_mask
from attnbias.bias.mask import Mask
from attnbias.bias.transposed import Transposed
from attnbias.errors import AttnbiasError
from attnbias.native import fits

Sizes = int | Sequence[int]


class Neighborhood(Mask):
    r"""Each query of a grid sees the ``kernel_size`` keys nearest to it along every dimension.

    Tokens are the cells of the grid in row-major order, queries and keys alike. Along a dimension
    of length L (dilation 1, stride 1) query i sees the keys

    .. math:: c - \lfloor k/2 \rfloor \le j \le c + \lceil k/2 \rceil - 1, \qquad
              c = \mathrm{clamp}(i,\, \lfloor k/2 \rfloor,\, L - \lceil k/2 \rceil)

    so the window is shifted inside at the borders and every query sees exactly k keys; a key is
    visible where it is so along all dimensions. With dilation g the same holds among the cells
    ``i, i ± g, i ± 2 g, ...``. A causal dimension shows ``i - k + 1 <= j <= i``, which is fewer
    keys at its start, as the window is not shifted. With stride s, s neighbouring queries share
    the window of their leader (the middle one; the last one where causal).

    Stored: O(sum of the grid's lengths). `span` gives tiles of rows the band of cells they see, so
    the cost grows with the keys seen; parts of the grid are cut by slicing.

    Args:
        grid: the lengths, one to three.
        kernel_size: keys seen along each dimension, at least 1, odd or even; ``kernel_size *
            dilation`` is at most the length.
        stride, dilation: at least 1; the stride is at most the kernel size.
        causal: for all dimensions, or one for each.
        device: where the entries are made.

    Source: the semantics of NATTEN 0.20 and later (``na1d``, ``na2d``, ``na3d``); Hassani et al.,
    "Neighborhood Attention Transformer", 2022, arXiv 2204.07143; dilation: Hassani and Shi, 2022,
    arXiv 2209.15001; causal: Hassani et al., 2024, arXiv 2403.04690; stride: Hassani et al.,
    2025, arXiv 2504.16922.
    """

    queries: int
    keys: int

    def __init__(
        self,
        grid: Sizes,
        kernel_size: Sizes,
        *,
        stride: Sizes = 1,
        dilation: Sizes = 1,
        causal: bool | Sequence[bool] = False,
        device: torch.device | None = None,
    ) -> None:
        self.grid = (grid,) if isinstance(grid, int) else tuple(grid)
        if not 1 <= len(self.grid) <= 3 or min(self.grid) < 1:
            raise AttnbiasError(
                "Neighborhood(grid) takes one to three lengths of at least 1, "
                f"got {tuple(self.grid)}."
            )
        self.kernel_size = self._each("kernel_size", kernel_size)
        self.stride = self._each("stride", stride)
        self.dilation = self._each("dilation", dilation)
        self.causal = tuple(bool(c) for c in self._each("causal", causal, least=0))
        for size, kernel, step, gap in zip(
            self.grid, self.kernel_size, self.stride, self.dilation, strict=True
        ):
            if kernel * gap > size or step > kernel:
                raise AttnbiasError(
                    "Neighborhood needs kernel_size * dilation <= length and stride <= "
                    f"kernel_size along each dimension, got kernel_size {kernel}, dilation {gap}, "
                    f"stride {step} and length {size}."
                )
        self.device = device
        self._ends = tuple(self._ends_of(d) for d in range(len(self.grid)))
        cells = math.prod(self.grid)
        self._rows = self._cols = slice(0, cells)
        self.queries = self.keys = cells

    def _each(
        self, name: str, given: Sizes | bool | Sequence[bool], least: int = 1
    ) -> tuple[int, ...]:
        each = (int(given),) * len(self.grid) if isinstance(given, int) else tuple(given)
        if len(each) != len(self.grid) or any(int(x) < least for x in each):
            raise AttnbiasError(
                f"Neighborhood {name} takes a number of at least {least} or one for each of the "
                f"{len(self.grid)} dimensions, got {given!r}."
            )
        return tuple(int(x) for x in each)

    def _ends_of(self, dim: int) -> Tensor:
        """``(2, length)``: the first and the last key that each cell sees along a dimension."""
        size, kernel = self.grid[dim], self.kernel_size[dim]
        step, gap = self.stride[dim], self.dilation[dim]
        cell = torch.arange(size)
        # Within a dilation group: the place of the cell, and the length of its group.
        group, place = cell % gap, cell // gap
        count = (size - group + gap - 1) // gap
        start = place // step * step
        if self.causal[dim]:
            leader = torch.minimum(start + step - 1, count - 1)
            first, last = (leader - kernel + 1).clamp(min=0), place
        else:
            leader = torch.minimum(start + step // 2, count - 1)
            right = (kernel - 1) // 2
            centre = torch.minimum(leader.clamp(min=kernel // 2), count - 1 - right)
            first, last = centre - kernel // 2, centre + right
        return torch.stack([first, last]) * gap + group

    def __repr__(self) -> str:
        words = f"grid={self.grid}, kernel_size={self.kernel_size}"
        for name, plain in (("stride", 1), ("dilation", 1), ("causal", False)):
            if any(x != plain for x in getattr(self, name)):
                words += f", {name}={getattr(self, name)}"
        return f"Neighborhood({words}, {self.queries}, {self.keys})"

    def _coordinates(self, part: slice) -> list[Tensor]:
        """The coordinates of a range of cells, one tensor for each dimension."""
        rest = torch.arange(part.start, part.stop)
        found = []
        for size in reversed(self.grid):
            found.append(rest % size)
            rest = rest // size
        return found[::-1]

    @property
    def part(self) -> tuple[slice, slice]:
        """The cells that are queries and those that are keys."""
        return self._rows, self._cols

    def windows(self) -> tuple[Tensor, Tensor, Tensor]:
        """First and last coordinate that each query sees, ``(dimensions, queries)``, in steps of
        the dilation from the first, and the coordinates of the keys, ``(dimensions, keys)``.
        """
        rows = self._coordinates(self._rows)
        ends = torch.stack([e[:, c] for e, c in zip(self._ends, rows, strict=True)], 1)
        return ends[0], ends[1], torch.stack(self._coordinates(self._cols))

    def dense(self) -> Tensor:
        seen = torch.ones(self.queries, self.keys, dtype=torch.bool)
        cells = zip(self._coordinates(self._rows), self._coordinates(self._cols), strict=True)
        for dim, (query, key) in enumerate(cells):
            first, last = self._ends[dim][:, query, None]
            seen &= (key >= first) & (key <= last)
            if self.dilation[dim] > 1:
                seen &= (key - query[:, None]) % self.dilation[dim] == 0
        return to_mask(seen).to(self.device)[None, None]

    def add_to(self, tile: Tensor) -> None:
        if not fits(tile) or not tile.is_contiguous() or not tile.numel():
            super().add_to(tile)
            return
        from attnbias.native import neighborhood as loops

        # Three dimensions for all: those before the first one have a single cell.
        more = 3 - len(self.grid)
        grid = torch.tensor((1,) * more + self.grid)
        gaps = torch.tensor((1,) * more + self.dilation)
        ends = [torch.zeros(2, 1, dtype=torch.int64)] * more + list(self._ends)
        tile, (a, b, c) = tile.view(-1, self.queries, self.keys), ends
        loops.hide(tile, grid, gaps, a, b, c, self._rows.start, self._cols.start)

    def span(self, rows: slice) -> tuple[int, int]:
        part = slice(self._rows.start + rows.start, self._rows.start + rows.stop)
        if part.stop <= part.start or self.keys == 0:
            return (0, 0)
        low = high = torch.zeros(part.stop - part.start, dtype=torch.int64)
        for dim, cell in enumerate(self._coordinates(part)):
            first, last = self._ends[dim][:, cell]
            low, high = low * self.grid[dim] + first, high * self.grid[dim] + last
        first_key = min(max(int(low.min()) - self._cols.start, 0), self.keys)
        last_key = min(max(int(high.max()) + 1 - self._cols.start, 0), self.keys)
        return (first_key, max(first_key, last_key))

    def transpose(self) -> Bias:
        return Transposed(self)

    def _select(self, batch: slice, heads: slice, rows: slice, cols: slice) -> Bias:
        part = object.__new__(Neighborhood)
        part.__dict__.update(self.__dict__)
        start, first = self._rows.start, self._cols.start
        part._rows = slice(start + rows.start, start + rows.stop)
        part._cols = slice(first + cols.start, first + cols.stop)
        part.queries, part.keys = length(rows), length(cols)
        return part
