"""Attention received by each key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic
from attnbias.observe.tiles import Tile

DENOMINATORS = ("sum", "queries", "visible")


@dataclass(frozen=True)
class Received(Statistic):
    r"""Attention that each key receives from all queries.

    .. math:: R_j = \frac{1}{Z_j} \sum_i p_{ij}

    with ``Z_j = 1`` ("sum"), the number of real queries of the row ("queries"), or the number of
    real queries that can see key ``j`` by the model's own masks ("visible").

    Values: ``(batch, head, key)`` by absolute token position of the key; NaN where a row of the
    batch has no such token, and with "visible" where no query can see it. Over the forwards of a
    run (chunks of a prefill, decoding steps) the sums add up and the key axis grows.
    Table: the value, under this denominator, of the key that receives the largest sum in its row,
    as the mean over the rows of the batch (and runs). The mean over keys would say nothing: it is
    fixed by the number of keys.
    Cost: a part of one compiled sweep (about half the forward, for all that it finds). Without it
    one unbiased call where masks and biases per key are all that is added
    (``R_j = exp(lse of attention with queries and keys exchanged and key bias -lse_i)``), tiles
    otherwise.

    Args:
        denominator: "sum", "queries" or "visible".
    """

    name: ClassVar[str] = "received"
    over: ClassVar[str] = "key"
    swept: ClassVar[tuple[str, ...]] = ("columns",)
    denominator: str = "sum"

    def __post_init__(self) -> None:
        if self.denominator not in DENOMINATORS:
            raise AttnbiasError(
                f"Received(denominator) is one of {', '.join(DENOMINATORS)}, "
                f"got {self.denominator!r}."
            )

    def channels(self, scene: Scene) -> int:
        return 2 if self.denominator == "visible" else 1

    def tile(self, tile: Tile) -> Tensor:
        received = tile.probabilities.double().sum(-2)
        if self.denominator != "visible":
            return received[..., None]
        seen = tile.visible.sum(-2).expand_as(received)
        return torch.stack([received, seen.to(received)], -1)

    def plan(self, scene: Scene) -> bool:
        return not scene.terms("other")

    def fused(self, scene: Scene) -> Tensor:
        if self.denominator != "visible":
            return scene.columns[..., None]
        seen = scene.visible.expand_as(scene.columns)
        return torch.stack([scene.columns, seen], -1)

    def finish(self, gathered: Gathered) -> Tensor:
        received = gathered.sums[..., 0]
        if self.denominator == "queries":
            return received / gathered.queries[..., None]
        if self.denominator == "visible":
            seen = gathered.sums[..., 1]
            return torch.where(seen > 0, received / seen, torch.nan)
        return received

    def summary(self, gathered: list[Gathered]) -> Tensor:
        tops = []
        for part in gathered:
            most = part.sums[..., 0].nan_to_num(-1).argmax(-1, keepdim=True)
            tops.append(self.finish(part).gather(-1, most)[..., 0])
        return torch.nanmean(torch.cat(tops), 0)
