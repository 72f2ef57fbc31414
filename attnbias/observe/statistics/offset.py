"""Attention to the token at a fixed offset: the previous one, the token itself, the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Offset(Statistic):
    r"""Attention of a query to the token at a fixed distance from it, within one sequence.

    .. math:: O_i = p_{i,\, i + \mathrm{by}}

    A head with a large mean at -1 is a previous-token head.

    Values: ``(batch, head, query)``, NaN where there is no such token. Table: the mean over the
    queries that have one.
    Cost: O(N dim), without a call of its own (the log-sum-exp aside).

    Args:
        by: offset of the key in tokens; negative is before the query.

    Source: What Does BERT Look At? An Analysis of BERT's Attention (2019, arXiv 1906.04341), which
    has the offsets -1, 0 and 1; authors' code read.
    """

    name: ClassVar[str] = "offset"
    by: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.by, int) or isinstance(self.by, bool):
            raise AttnbiasError(f"Offset(by) must be a whole number of tokens, got {self.by!r}.")

    def _at(self, scene: Scene) -> Tensor:
        at = scene.query_positions + self.by
        return torch.where(scene.real, at, -1).clamp_min(-1)[..., None]

    def tile(self, tile: Tile) -> Tensor:
        at = self._at(tile.scene)
        hit = tile.key_positions[:, None, :] == at[tile.batch, tile.rows]
        found = (tile.probabilities * hit[:, None]).sum(-1)
        there = tile.scene.exists(at)[tile.batch, tile.rows, 0]
        return torch.where(there[:, None], found, torch.nan)

    def plan(self, scene: Scene) -> bool:
        return True

    def light(self, scene: Scene) -> bool:
        return True

    def fused(self, scene: Scene) -> Tensor:
        at = self._at(scene)
        found = scene.entries(scene.slots(at))
        return torch.where(scene.exists(at)[:, None], found, torch.nan)[..., 0]
