"""How far away in the image a patch looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.grid import Grid
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class GridDistance(Statistic):
    r"""Mean distance in the image between a patch and the patches it attends to.

    .. math:: D_i = \frac{\sum_{j} p_{ij} \lVert x_i - x_j \rVert}{\sum_{j} p_{ij}}

    over the patches ``j`` alone: attention to a class token and registers is left out and the rest
    scaled up. :math:`x` are positions in the image, whose longer side has length 1 from the centre
    of the first patch to that of the last. A head of even attention has about 0.52 on a square.

    Values: ``(batch, head, query)``, NaN for queries that are no patch or see none. Table: the mean
    over the patches. Cost: tiles.

    Args:
        grid: rows and columns of patches, and the position of the first (``Grid.of(model,
            inputs)``); for a square grid after one class token, ``Grid(rows, columns)``.

    Source: Teaching Matters: Investigating the Role of Supervision in Vision Transformers (2022,
    arXiv 2212.03862), after Do Vision Transformers See Like Convolutional Neural Networks? (2021,
    arXiv 2108.08810); authors' code read. It takes square grids only; the longer side as the unit
    of others is chosen here.
    """

    name: ClassVar[str] = "grid_distance"
    grid: Grid | None = None

    def __post_init__(self) -> None:
        check_grid(type(self).__name__, self.grid)

    def parameters(self) -> dict[str, object]:
        return {**super().parameters(), "grid": str(self.grid)}

    def channels(self, scene: Scene) -> int:
        return 2

    def tile(self, tile: Tile) -> Tensor:
        query, key, pairs = between(self.grid, tile)
        gap = (query[:, :, None] - key[:, None]).double().square().sum(-1).sqrt()
        assert self.grid is not None
        unit = max(self.grid.rows, self.grid.columns) - 1
        p = tile.probabilities.double() * pairs[:, None]
        return torch.stack([(p * gap[:, None] / max(unit, 1)).sum(-1), p.sum(-1)], -1)

    def finish(self, gathered: Gathered) -> Tensor:
        weighted, mass = gathered.sums.unbind(-1)
        return torch.where(mass > 0, weighted / mass, torch.nan)


def check_grid(name: str, grid: object) -> None:
    """A sentence where a statistic of images is made without its grid."""
    if not isinstance(grid, Grid):
        raise AttnbiasError(
            f"{name} needs the grid of patches; write {name}(Grid(rows, columns)) or "
            f"{name}(Grid.of(model, inputs)), got {grid!r}."
        )


def between(grid: Grid | None, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Cells of the queries (b, r, 2) and keys (b, c, 2), and which pairs are patches (b, r, c)."""
    assert grid is not None
    query, key = grid.cells(tile.query_positions), grid.cells(tile.key_positions)
    return query, key, (query[..., 0] >= 0)[:, :, None] & (key[..., 0] >= 0)[:, None]
