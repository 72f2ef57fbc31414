"""Where a query attends most: the keys with the largest weights, and those weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.largest import joined, largest
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import State, Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Peak(Statistic):
    r"""The largest attention weights of each query, and the positions of the keys that get them.

    .. math:: w_i = \max_j p_{ij}, \qquad j^*_i = \arg\max_j p_{ij}

    and, with `count`, the next ones. Among equal weights the first key counts.

    Values: ``(batch, head, query, 2 count)``: "weight" and "position" (absolute, of the key); with
    a count above 1 "weight 1" and "position 1" of the largest, then those of the next; weight 0 and
    position NaN where a query has fewer keys with a weight. Table: ``peak[weight]`` and
    ``peak[position]``, their means over the queries.
    Cost: a part of one compiled sweep; tiles otherwise.

    Args:
        count: how many keys of each query; 1 or more.
    """

    name: ClassVar[str] = "peak"
    swept: ClassVar[tuple[str, ...]] = ("peak",)
    count: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.count, int) or isinstance(self.count, bool) or self.count < 1:
            raise AttnbiasError(f"Peak(count) must be a whole number from 1, got {self.count!r}.")

    def channels(self, scene: Scene) -> int:
        return 2 * self.count

    def tile(self, tile: Tile) -> Tensor:
        weight, slot = largest(tile.probabilities, self.count)
        return _placed(weight, slot, tile.key_positions)

    def start(self, scene: Scene) -> State:
        return _Largest(self, scene)

    def plan(self, scene: Scene) -> bool:
        scene.ask_top(self.count)
        return False

    def fused(self, scene: Scene) -> Tensor:
        weight, slot = (found[..., : self.count] for found in scene.peak)
        return _placed(weight, slot, scene.key_positions)

    def axes(self) -> tuple[str, ...]:
        return ("query", "of")

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        if self.count == 1:
            return {"of": ["weight", "position"]}
        return {"of": [f"{w} {n + 1}" for n in range(self.count) for w in ("weight", "position")]}


def _placed(weight: Tensor, slot: Tensor, positions: Tensor) -> Tensor:
    """Weights and slots (b, h, r, count) as (b, h, r, 2 count), slots as positions."""
    if positions.shape[-1] == 0:
        positions = positions.new_full((positions.shape[0], 1), -1)
    table = positions[:, None, None].expand(*weight.shape[:3], -1)
    where = table.gather(-1, slot.clamp_min(0)).to(weight)
    where = torch.where(weight > 0, where, torch.nan)
    return torch.stack([weight, where], -1).flatten(-2)


class _Largest(State):
    """The largest weights stay; of equal ones, those of the earlier keys."""

    def __init__(self, statistic: Statistic, scene: Scene) -> None:
        super().__init__(statistic, scene)
        self.sums[..., 1::2] = torch.nan

    def update(self, tile: Tile) -> None:
        self._take(self.statistic.tile(tile).double(), (tile.batch, tile.heads, tile.rows))

    def merge(self, other: State) -> None:
        super().merge(_like(other))  # refuses what does not belong together, and adds nothing
        self._take(other.sums, (slice(None),) * 3)

    def _take(self, found: Tensor, at: tuple[slice, slice, slice]) -> None:
        both = torch.cat([self.sums[at], found], -1)
        weight, place = both[..., ::2], both[..., 1::2].nan_to_num(torch.inf)
        weight, place = joined(weight, place, found.shape[-1] // 2)
        place = torch.where(weight > 0, place, torch.nan)
        self.sums[at] = torch.stack([weight, place], -1).flatten(-2)


def _like(state: State) -> State:
    empty = object.__new__(type(state))
    empty.statistic, empty.sums = state.statistic, torch.zeros_like(state.sums)
    return empty
