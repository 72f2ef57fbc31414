"""Attention of a patch to its neighbours in the image, by their distance in steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.grid import Grid
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic
from attnbias.observe.statistics.grid_distance import between, check_grid
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Hops(Statistic):
    r"""Attention of a patch to all patches ``k`` steps away, the mean over the patches.

    .. math:: K_k = \frac{1}{n} \sum_i \sum_{j :\, d(i, j) = k} p_{ij}

    with ``d`` the number of steps between neighbouring patches: of eight neighbours (the larger of
    the two differences) or of four (their sum). Entry 0 is a patch itself. What is missing to 1
    goes to the class token and registers.

    Values: ``(batch, head, hops)`` from 0 to the largest distance in the grid. Table: the mean
    number of steps under the profile. Cost: tiles.

    Args:
        grid: as in `GridDistance`. neighbours: 8 or 4.
        each: divide the attention of a patch by the number of patches it has at that distance,
            which is the mean strength towards one of them.

    Source: after How Does Attention Work in Vision Transformers? A Visual Analytics Attempt (2023,
    arXiv 2303.13731), abstract only: eight neighbours, the sum over those at one distance and the
    largest distance are chosen here.
    """

    name: ClassVar[str] = "hops"
    over: ClassVar[str] = "sequence"
    grid: Grid | None = None
    neighbours: int = 8
    each: bool = False

    def __post_init__(self) -> None:
        check_grid(type(self).__name__, self.grid)
        if self.neighbours not in (4, 8):
            raise AttnbiasError(f"Hops(neighbours) must be 4 or 8, got {self.neighbours!r}.")

    def parameters(self) -> dict[str, object]:
        return {**super().parameters(), "grid": str(self.grid)}

    @property
    def most(self) -> int:
        """The largest number of steps in the grid."""
        assert self.grid is not None
        high, wide = self.grid.rows - 1, self.grid.columns - 1
        return max(high, wide) if self.neighbours == 8 else high + wide

    def channels(self, scene: Scene) -> int:
        return self.most + 2  # the last one counts the patches that attend

    def tile(self, tile: Tile) -> Tensor:
        query, key, pairs = between(self.grid, tile)
        p = tile.probabilities.double() * pairs[:, None]
        steps = self._steps(query[:, :, None], key[:, None])
        if self.each:
            p = p / self._having(query, steps)[:, None]
        found = p.new_zeros(*p.shape[:2], self.most + 2)
        place = torch.where(pairs, steps, 0).flatten(-2)[:, None].expand(-1, p.shape[1], -1)
        found.scatter_add_(-1, place, p.flatten(-2))
        # Rows may be cut along the keys: a query is counted by its share of its own row.
        found[..., -1] = (tile.probabilities.double() * (query[..., 0] >= 0)[:, None, :, None]).sum(
            (-1, -2)
        )
        return found

    def _steps(self, query: Tensor, key: Tensor) -> Tensor:
        gap = (query - key).abs()
        return gap.amax(-1) if self.neighbours == 8 else gap.sum(-1)

    def _having(self, query: Tensor, steps: Tensor) -> Tensor:
        """(b, r, c): how many patches stand as far from the query as this one."""
        assert self.grid is not None
        cells = self.grid.cells(torch.arange(self.grid.start, self.grid.stop, device=query.device))
        all_steps = self._steps(query[:, :, None], cells)
        counts = torch.nn.functional.one_hot(all_steps.clamp(0, self.most), self.most + 1).sum(2)
        return counts.gather(-1, steps.clamp(0, self.most)).clamp_min(1)

    def finish(self, gathered: Gathered) -> Tensor:
        count = gathered.sums[..., -1:]
        return torch.where(count > 0, gathered.sums[..., :-1] / count, torch.nan)

    def axes(self) -> tuple[str, ...]:
        return ("hops",)

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        return {"hops": [str(n) for n in range(self.most + 1)]}

    def summary(self, gathered: list[Gathered]) -> Tensor:
        profile = torch.cat([self.finish(part) for part in gathered]).nanmean(0)
        steps = torch.arange(self.most + 1, dtype=profile.dtype, device=profile.device)
        return (profile * steps).sum(-1) / profile.sum(-1)
