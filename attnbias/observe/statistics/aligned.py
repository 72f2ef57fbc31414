"""The mean attention map of an image with every patch moved to the middle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.observe.grid import Grid
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic
from attnbias.observe.statistics.grid_distance import between, check_grid
from attnbias.observe.tiles import Tile

LEAST = 1e-30  # of attention to patches, under which a patch is taken to see none


@dataclass(frozen=True)
class Aligned(Statistic):
    r"""Attention by offset in the image, the mean over the patches that attend.

    .. math:: A_{\delta} = \frac{1}{n} \sum_i \tilde p_{i,\, x_i + \delta}, \qquad
        \tilde p_{ij} = \frac{p_{ij}}{\sum_{j'} p_{ij'}}

    over the ``n`` patches ``i`` and the patches ``j``; a class token and registers are left out and
    the rest scaled up. An offset that leads out of the image counts as 0. A map that peaks beside
    the middle is that of a head that looks at a fixed neighbour.

    Values: ``(batch, head, down, across)`` with ``2 rows - 1`` and ``2 columns - 1`` offsets; each
    map sums to 1. Table: the distance of its centre of mass from the middle, in units of ``rows -
    1`` and ``columns - 1`` patches (`centre` gives both coordinates, -1 to 1).
    Cost: tiles, and one call for the mass on patches.

    Args:
        grid: as in `GridDistance`.

    Source: Teaching Matters: Investigating the Role of Supervision in Vision Transformers (2022,
    arXiv 2212.03862); authors' code read. A patch whose attention is all on the class token counts
    there with a map of zeros, here not at all.
    """

    name: ClassVar[str] = "aligned"
    over: ClassVar[str] = "sequence"
    grid: Grid | None = None

    def __post_init__(self) -> None:
        check_grid(type(self).__name__, self.grid)

    def parameters(self) -> dict[str, object]:
        return {**super().parameters(), "grid": str(self.grid)}

    @property
    def _shape(self) -> tuple[int, int]:
        assert self.grid is not None
        return 2 * self.grid.rows - 1, 2 * self.grid.columns - 1

    def channels(self, scene: Scene) -> int:
        return self._shape[0] * self._shape[1]

    def tile(self, tile: Tile) -> Tensor:
        query, key, pairs = between(self.grid, tile)
        mass = self._mass(tile.scene)[tile.batch, tile.heads, tile.rows]
        weight = torch.where(mass > LEAST, 1 / mass.clamp_min(LEAST), 0.0)[..., None]
        p = (tile.probabilities.double() * weight * pairs[:, None]).flatten(-2)
        assert self.grid is not None
        offset = key[:, None] - query[:, :, None] + torch.tensor(
            [self.grid.rows - 1, self.grid.columns - 1], device=key.device
        )  # fmt: skip
        place = torch.where(pairs, offset[..., 0] * self._shape[1] + offset[..., 1], 0)
        found = p.new_zeros(*p.shape[:2], self._shape[0] * self._shape[1])
        index = place.flatten(-2)[:, None].expand(-1, p.shape[1], -1)
        return found.scatter_add_(-1, index, p)

    def _mass(self, scene: Scene) -> Tensor:
        """(B, H, N): the attention of each query that goes to patches."""
        assert self.grid is not None
        name = f"{self.name} {self.grid.start}:{self.grid.stop}"
        cells = self.grid.cells(scene.key_positions)
        scene.features.ask(name, (cells[..., :1] >= 0).to(scene.query))
        return scene.features.mean(name)[..., 0].double()

    def finish(self, gathered: Gathered) -> Tensor:
        whole = gathered.sums.sum(-1, keepdim=True)
        found = torch.where(whole > 0, gathered.sums / whole, torch.nan)
        return found.reshape(*found.shape[:-1], *self._shape)

    def axes(self) -> tuple[str, ...]:
        return ("down", "across")

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[int]]:  # type: ignore[override]
        down, across = (size // 2 for size in self._shape)
        return {
            "down": list(range(-down, down + 1)),
            "across": list(range(-across, across + 1)),
        }

    def summary(self, gathered: list[Gathered]) -> Tensor:
        maps = torch.cat([self.finish(part) for part in gathered])
        return centre(maps.nanmean(0)).square().sum(-1).sqrt()


def centre(maps: Tensor) -> Tensor:
    """``(..., 2)``: centre of mass (down, across) of aligned maps ``(..., down, across)``.

    In units of the largest offset, so between -1 and 1; 0 is the attending patch itself.
    """
    sizes = maps.shape[-2:]
    down, across = (
        torch.linspace(-1, 1, size, dtype=maps.dtype) if size > 1 else maps.new_zeros(1)
        for size in sizes
    )
    total = maps.sum((-1, -2))
    return torch.stack(
        [(maps.sum(-1) * down).sum(-1) / total, (maps.sum(-2) * across).sum(-1) / total], -1
    )
