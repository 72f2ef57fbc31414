"""Attention to designated keys: for each query the tokens that the caller points at."""

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
class At(Statistic):
    r"""Attention of each query to the keys that ``observe(..., targets={name: ...})`` names for it.

    .. math:: A_{it} = p_{i,\, \tau(i, t)}

    with :math:`\tau` the ``(tokens, T)`` key positions given; -1 names none. Prefix matching (the
    token after the earlier copy), lag profiles and syntactic relations are means of this.

    Values: ``(batch, head, query, target)``, NaN where no key is named or the row has none there.
    Table: one line for each target, ``at[name 0]``, the mean over the queries that have it.
    Cost: O(N T dim), without a call of its own (the log-sum-exp aside).

    Args:
        target: the name given in `targets`. count: how many keys it names for each query (T).
    """

    name: ClassVar[str] = "at"
    target: str = "target"
    count: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not self.target:
            raise AttnbiasError(f"At(target) must be the name of targets, got {self.target!r}.")
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise AttnbiasError(f"At(count) must be a whole number from 1, got {self.count!r}.")

    @property
    def aims(self) -> tuple[str, ...]:
        return (self.target,)

    def channels(self, scene: Scene) -> int:
        given = scene.targets[self.target].shape[-1]
        if given != self.count:
            raise AttnbiasError(
                f"targets[{self.target!r}] names {given} keys for each query; write "
                f"At({self.target!r}, count={given})."
            )
        return self.count

    def tile(self, tile: Tile) -> Tensor:
        at = tile.scene.aimed(self.target)
        slots = tile.scene.slots(at)[tile.batch, tile.rows]
        here = (slots >= tile.cols.start) & (slots < tile.cols.stop)
        p = tile.probabilities
        if p.shape[-1] == 0:
            found = p.new_zeros(*p.shape[:3], self.count)
        else:
            place = torch.where(here, slots - tile.cols.start, 0)[:, None]
            found = p.gather(-1, place.expand(-1, p.shape[1], -1, -1)) * here[:, None]
        there = tile.scene.exists(at)[tile.batch, tile.rows]
        return torch.where(there[:, None], found, torch.nan)

    def plan(self, scene: Scene) -> bool:
        self.channels(scene)
        return True

    def light(self, scene: Scene) -> bool:
        return True

    def fused(self, scene: Scene) -> Tensor:
        at = scene.aimed(self.target)
        found = scene.entries(scene.slots(at))
        return torch.where(scene.exists(at)[:, None], found, torch.nan)

    def axes(self) -> tuple[str, ...]:
        return ("query", "target")

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        return {"target": [f"{self.target} {n}" for n in range(self.count)]}
