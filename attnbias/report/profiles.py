"""What a page shows of one head: what each token receives from it, at which distance, its map."""

from __future__ import annotations

import base64
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic
from attnbias.observe.tiles import Tile, tiles
from attnbias.report.data import Profile

if TYPE_CHECKING:
    from attnbias.observe import Seen

BINS = 512
"""Up to so many tokens each has its own bin of received attention, else 256 to 512 bins."""
TOP = 64
"""Keys of a head that are named with their share."""
MAP_TOKENS = 128
"""Up to so many tokens a head's map over the tokens is kept ..."""
MAP_WEIGHTS = 4_000_000
"""... where all maps together have at most so many weights."""
WHOLE = 4096
"""Up to so many queries all are read for the distances, else SAMPLED of them."""
SAMPLED = 1024
ROWS = 16


def gaps(length: int) -> tuple[tuple[int, int], ...]:
    """Bins of the distance i - j: ahead, itself, back; 1, 2, 3-4, 5-8 and so on."""
    ends = [0, 1]
    while ends[-1] < length - 1:
        ends.append(min(2 * ends[-1], length - 1))
    back = [(low + 1, high) for low, high in itertools.pairwise(ends)]
    ahead = [(-high, -low) for low, high in reversed(back)]
    return (*ahead, (0, 0), *back)


@dataclass(frozen=True)
class Near(Statistic):
    """Share of attention at each signed distance i - j of `gaps(length)`, mean over the queries."""

    name: ClassVar[str] = "near"
    over: ClassVar[str] = "sequence"
    length: int = 1

    def channels(self, scene: Scene) -> int:
        return len(gaps(self.length))

    def _bin(self, tile: Tile) -> Tensor:
        starts = torch.tensor([low for low, _ in gaps(self.length)], device=tile.scene.device)
        gap = tile.query_positions[0, :, None] - tile.key_positions[0, None, :]
        return torch.bucketize(gap, starts, right=True).clamp_min(1) - 1

    def tile(self, tile: Tile) -> Tensor:
        p = tile.probabilities
        found = p.new_zeros(*p.shape[:2], len(gaps(self.length)))
        return found.index_add_(2, self._bin(tile).flatten(), p.flatten(2))

    def plan(self, scene: Scene) -> bool:
        return scene.queries > WHOLE

    def light(self, scene: Scene) -> bool:
        return True

    def fused(self, scene: Scene) -> Tensor:
        """From SAMPLED queries in blocks of ROWS, evenly placed, as if from all."""
        wanted = torch.zeros(scene.batch, scene.heads, scene.queries, dtype=torch.bool)
        starts = torch.linspace(0, (scene.queries - 1) // ROWS, SAMPLED // ROWS).long() * ROWS
        for start in starts.tolist():
            wanted[:, :, start : start + ROWS] = True
        found = torch.zeros(scene.batch, scene.heads, len(gaps(self.length)), dtype=torch.float64)
        for tile in tiles(scene, rows=ROWS, wanted=wanted):
            found[tile.batch, tile.heads] += self.tile(tile).double().cpu()
        return (found * (scene.queries / wanted[0, 0].sum())).to(scene.device)

    def finish(self, gathered: Gathered) -> Tensor:
        return gathered.sums / gathered.queries[..., None]

    def axes(self) -> tuple[str, ...]:
        return ("gap",)

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        return {"gap": [f"{low} to {high}" for low, high in gaps(self.length)]}


@dataclass(frozen=True)
class Whole(Statistic):
    """The map itself, queries by keys, of a text of `length` tokens. Short texts only."""

    name: ClassVar[str] = "whole"
    length: int = 1

    def channels(self, scene: Scene) -> int:
        return self.length

    def tile(self, tile: Tile) -> Tensor:
        p = tile.probabilities
        found = p.new_zeros(*p.shape[:3], self.length)
        return found.index_add_(3, tile.key_positions[0].clamp_min(0), p)

    def axes(self) -> tuple[str, ...]:
        return ("query", "to")

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        return {"to": [str(n) for n in range(self.length)]}


def bins(length: int) -> tuple[int, ...]:
    """First position of each bin of received attention."""
    step = 1
    while length > step * BINS:
        step *= 2
    return tuple(range(0, length, step))


def binned(received: Tensor, starts: tuple[int, ...]) -> Tensor:
    """(..., keys) summed within bins (..., bins)."""
    step = starts[1] if len(starts) > 1 else received.shape[-1]
    short = torch.nn.functional.pad(received, (0, -received.shape[-1] % step))
    return short.unfold(-1, step, step).sum(-1)


def keeps_maps(heads: int, length: int) -> bool:
    """Whether a map over the tokens is kept for every head."""
    return length <= MAP_TOKENS and heads * length * length <= MAP_WEIGHTS


def profiles(
    sites: list[Any], runs: tuple[Seen, Seen, Seen], received: str, maps: bool
) -> tuple[Profile, ...]:
    """One profile for each head of each site, from the text, its shuffle and random weights."""
    found: list[Profile] = []
    for tower in dict.fromkeys(site.tower for site in sites):
        layers = [site.layer for site in sites if site.tower == tower]
        share = _of(runs[0], received, tower)
        near = [_of(seen, "near", tower) for seen in runs]
        whole = _of(runs[0], "whole", tower) if maps else None
        starts = bins(share.shape[-1])
        parts = binned(share.nan_to_num(0), starts)
        value, place = share.nan_to_num(0).topk(min(TOP, share.shape[-1]), -1)
        for row, layer in enumerate(layers):
            for head in range(share.shape[1]):
                if bool(share[row, head].isnan().all()):
                    continue
                at = (row, head)
                top = tuple(zip(place[at].tolist(), _row(value[at]), strict=True))
                rows = [_row(one[at]) for one in near]
                shown = "" if whole is None else _packed(whole[at])
                found.append(Profile(
                    tower, layer, head, _row(parts[at]), top, rows[0], rows[1], rows[2], shown
                ))  # fmt: skip
    return tuple(found)


def _of(seen: Seen, name: str, tower: str) -> Tensor:
    """(layers, heads, ...) of the only run and row."""
    values: Tensor = seen.tensor(name, tower).select(run=0, batch=0).values
    return values


def _row(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{x:.5g}") for x in values.tolist())


def _packed(weights: Tensor) -> str:
    levels = (weights.nan_to_num(0).clamp(0, 1).sqrt() * 255).round().to(torch.uint8)
    return base64.b64encode(levels.contiguous().numpy().tobytes()).decode("ascii")
