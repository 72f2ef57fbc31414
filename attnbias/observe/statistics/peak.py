"""Where a query attends most: the key with the largest weight, and that weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.observe.scene import Scene
from attnbias.observe.statistic import State, Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Peak(Statistic):
    r"""The largest attention weight of each query, and the position of the key that gets it.

    .. math:: w_i = \max_j p_{ij}, \qquad j^*_i = \arg\max_j p_{ij}

    Among equal weights the first key counts.

    Values: ``(batch, head, query, 2)``: "weight" and "position" (absolute, of the key). Table:
    ``peak[weight]`` and ``peak[position]``, their means over the queries.
    Cost: a part of one compiled sweep; tiles otherwise.
    """

    name: ClassVar[str] = "peak"
    swept: ClassVar[tuple[str, ...]] = ("peak",)

    def channels(self, scene: Scene) -> int:
        return 2

    def tile(self, tile: Tile) -> Tensor:
        p = tile.probabilities
        if p.shape[-1] == 0:
            return torch.cat([p.new_zeros(*p.shape[:3], 1), p.new_full((*p.shape[:3], 1), -1)], -1)
        weight = p.amax(-1)
        # max may name any of several equal keys: the first is asked for.
        first = (p == weight[..., None]).long().argmax(-1)
        where = tile.key_positions[:, None].expand(-1, p.shape[1], -1).gather(-1, first)
        return torch.stack([weight, where.to(weight)], -1)

    def start(self, scene: Scene) -> State:
        return _Largest(self, scene)

    def fused(self, scene: Scene) -> Tensor:
        weight, slot = scene.peak
        where = scene.key_positions[:, None].expand(-1, scene.heads, -1).gather(-1, slot)
        return torch.stack([weight, where.to(weight)], -1)

    def axes(self) -> tuple[str, ...]:
        return ("query", "of")

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        return {"of": ["weight", "position"]}


class _Largest(State):
    """The larger of two weights stays; of equal ones, the earlier key's."""

    def __init__(self, statistic: Statistic, scene: Scene) -> None:
        super().__init__(statistic, scene)
        self.sums[..., 0], self.sums[..., 1] = -1.0, torch.inf

    def update(self, tile: Tile) -> None:
        self._take(self.statistic.tile(tile).double(), (tile.batch, tile.heads, tile.rows))

    def merge(self, other: State) -> None:
        super().merge(_like(other))  # refuses what does not belong together, and adds nothing
        self._take(other.sums, (slice(None),) * 3)

    def _take(self, found: Tensor, at: tuple[slice, slice, slice]) -> None:
        old = self.sums[at]
        more = found[..., 0] > old[..., 0]
        same = (found[..., 0] == old[..., 0]) & (found[..., 1] < old[..., 1])
        self.sums[at] = torch.where((more | same)[..., None], found, old)


def _like(state: State) -> State:
    empty = object.__new__(type(state))
    empty.statistic, empty.sums = state.statistic, torch.zeros_like(state.sums)
    return empty
