"""How far away a query looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Distance(Statistic):
    r"""Mean distance between a query and the keys it attends to, in tokens.

    .. math:: D_i = \sum_j p_{ij}\, |i - j|

    with absolute token positions: padding, windows and caches do not move them. In cross-attention
    the positions are those in the two sequences. Under sink logits the sink is at no distance.

    Values: ``(batch, head, query)``. Table: the mean over all real queries of all rows.
    Cost: a part of one compiled sweep. Without it one unbiased call within a sequence (the mean
    position of the keys up to the query and of those after it, centred on each block of queries),
    tiles in cross-attention.
    """

    name: ClassVar[str] = "distance"
    gives_lse: ClassVar[bool] = True
    swept: ClassVar[tuple[str, ...]] = ("gap",)

    def tile(self, tile: Tile) -> Tensor:
        gap = (tile.query_positions[:, :, None] - tile.key_positions[:, None, :]).abs()
        return (tile.probabilities * gap[:, None].to(tile.probabilities)).sum(-1)

    def plan(self, scene: Scene) -> bool:
        if scene.own_slot is None:
            return False
        scene.features.ask_gap()
        return True

    def fused(self, scene: Scene) -> Tensor:
        return scene.features.gap.clamp_min(0)
