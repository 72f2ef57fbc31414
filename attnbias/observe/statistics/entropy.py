"""Entropy of the attention of each query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile, tiles


@dataclass(frozen=True)
class Entropy(Statistic):
    r"""How widely a query spreads its attention, in nats.

    .. math:: H_i = -\sum_j p_{ij} \ln p_{ij}

    Between 0 (one key) and the logarithm of the number of visible keys. Under sink logits the sum
    runs over the keys shown, whose probabilities add up to less than one, as in the model's eager
    map.

    Values: ``(batch, head, query)``. Table: the mean over all real queries of all rows.
    Cost: a part of one compiled sweep. Without it one unbiased call where masks are all that is
    added (``H_i = lse_i - s q_i . sum_j p_ij k_j`` with centred keys; that difference loses digits
    where scores are large, so blocks with a row whose rounding may exceed 1e-5 are computed again
    from tiles), tiles otherwise.
    """

    name: ClassVar[str] = "entropy"
    gives_lse: ClassVar[bool] = True
    swept: ClassVar[tuple[str, ...]] = ("inner",)

    def tile(self, tile: Tile) -> Tensor:
        p = tile.probabilities
        surprise = (
            tile.lse[..., None] - tile.scores
        )  # -ln p, kept where p is too small for a number
        return (p * surprise.masked_fill(p == 0, 0.0)).sum(-1)

    def plan(self, scene: Scene) -> bool:
        return not scene.terms("key") and not scene.terms("other")

    def fused(self, scene: Scene) -> Tensor:
        row = scene.inner
        if scene.swept:
            return row
        unsure = scene.unsure
        for tile in tiles(scene, wanted=unsure):
            part = (tile.batch, tile.heads, tile.rows)
            row[part] = torch.where(unsure[part], self.tile(tile), row[part])
        return row
