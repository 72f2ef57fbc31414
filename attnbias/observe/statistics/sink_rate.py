"""Whether a head uses a token as an attention sink."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class SinkRate(Statistic):
    r"""Whether a head pays more than `threshold` of its attention to one token.

    .. math:: \mathrm{sink} = \mathbb{1}\Big[\frac{1}{|V|} \sum_{i \in V} p_{it} > \epsilon\Big]

    with ``V`` the real queries that can see token ``t`` by the model's own masks.

    Values: ``(batch, head)``, 0 or 1; NaN where no query can see the token. Table: the mean over
    the rows of the batch (and runs), so the mean over heads and layers is the sink metric of the
    source.
    Cost: O(N d), the scores of one key.

    Args:
        threshold: above it a head counts as a sink; between 0 and 1.
        token: absolute position of the token, 0 for the first real token of the row.

    The source's metric also cuts every text to its first 64 tokens and reads Sink_k for each k;
    `measures.SinkMetric` does both.

    Source: Gu et al., "When Attention Sink Emerges in Language Models: An Empirical View", 2024
    (arXiv 2410.10781); threshold 0.3 and the first token are its choice; authors' code read.
    """

    name: ClassVar[str] = "sink_rate"
    sampled: ClassVar[bool | None] = True
    threshold: float = 0.3
    token: int = 0

    def __post_init__(self) -> None:
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not (number and 0 <= self.threshold <= 1):
            raise AttnbiasError(
                f"SinkRate(threshold) must lie between 0 and 1, got {self.threshold!r}."
            )
        if not isinstance(self.token, int) or isinstance(self.token, bool) or self.token < 0:
            raise AttnbiasError(
                f"SinkRate(token) must be a token position of 0 or more, got {self.token!r}."
            )

    def channels(self, scene: Scene) -> int:
        return 2

    def tile(self, tile: Tile) -> Tensor:
        here = (tile.key_positions == self.token)[:, None, None, :]
        share = (tile.probabilities * here).sum(-1)
        seen = (tile.visible & here).sum(-1).expand_as(share)
        return torch.stack([share, seen.to(share)], -1)

    def plan(self, scene: Scene) -> bool:
        return True

    def light(self, scene: Scene) -> bool:
        return True

    def fused(self, scene: Scene) -> Tensor:
        slot = scene.slot_of(self.token)
        share = scene.column(slot)
        return torch.stack([share, scene.sees(slot).expand_as(share).to(share)], -1)

    def finish(self, gathered: Gathered) -> Tensor:
        share, seen = gathered.total().unbind(-1)
        return torch.where(seen > 0, (share / seen > self.threshold).double(), torch.nan)

    def axes(self) -> tuple[str, ...]:
        return ()

    def summary(self, gathered: list[Gathered]) -> Tensor:
        return torch.nanmean(torch.cat([self.finish(g) for g in gathered]), 0)
