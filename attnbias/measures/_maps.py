"""Whole attention maps of short texts, laid out by token position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures._residual import main_tower
from attnbias.observe import observe
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile

LONGEST = 4096  # a map of this many tokens has 16 million numbers for each head


@dataclass(frozen=True)
class _Map(Statistic):
    """Each query's whole row. Memory O(queries * keys): for short texts."""

    name: ClassVar[str] = "map"

    def channels(self, scene: Scene) -> int:
        size = int(scene.key_positions.amax()) + 1 if scene.key_positions.numel() else 0
        if size > LONGEST:
            raise AttnbiasError(
                f"whole maps are kept for at most {LONGEST} tokens, got {size}: give shorter texts."
            )
        return size

    def tile(self, tile: Tile) -> Tensor:
        p = tile.probabilities
        out = p.new_zeros(*p.shape[:3], self.channels(tile.scene))
        known = tile.key_positions >= 0
        at = torch.where(known, tile.key_positions, 0)[:, None, None].expand(p.shape)
        return out.scatter_add(-1, at, p * known[:, None, None])

    def axes(self) -> tuple[str, ...]:
        return ("query", "key")


def attention_maps(
    model: nn.Module, inputs: Mapping[str, Any], tower: str | None = None
) -> tuple[tuple[int, ...], Tensor]:
    """The layers of a tower and ``(batch, layers, heads, queries, keys)`` float64 by position.

    Rows of tokens that there are not (shorter texts) are NaN; so are heads that a layer lacks.
    """
    tower = main_tower(model, tower)
    with torch.no_grad(), observe(model, [_Map()]) as seen:
        model(**inputs)
    found = seen.tensor("map", tower)
    if found.values.shape[0] > 1:
        raise AttnbiasError(f"the tower {tower!r} was run several times in one forward.")
    return tuple(found.labels["layer"]), found.values[0].movedim(0, 1)
