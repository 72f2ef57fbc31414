"""Share of attention that goes to the first token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class FirstToken(Statistic):
    r"""Share of a query's attention that goes to the first real token of its row: ``p_{i0}``.

    Padding on the left does not move it: token 0 is the first token that is not padding. A query
    that cannot see it (a window) has share 0 and counts.

    Values: ``(batch, head, query)``, between 0 and 1. Table: the mean over all real queries of all
    rows.
    Cost: O(N d), the scores of one key.
    """

    name: ClassVar[str] = "first_token"

    def tile(self, tile: Tile) -> Tensor:
        first = (tile.key_positions == 0)[:, None, None, :]
        return (tile.probabilities * first).sum(-1)

    def plan(self, scene: Scene) -> bool:
        return True

    def light(self, scene: Scene) -> bool:
        return True

    def fused(self, scene: Scene) -> Tensor:
        return scene.column(scene.slot_of(0))
