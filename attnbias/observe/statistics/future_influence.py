"""How much the tokens that follow attend to each key."""

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
class FutureInfluence(Statistic):
    r"""Mean attention that a key receives from the queries some way after it (FAI).

    .. math:: \mathrm{FAI}_j = \frac{1}{|T_j|} \sum_{i \in T_j} p_{ij}, \qquad
        T_j = \{\, i : j + \text{low} \le i \le \min(N - 1, j + \text{high}) \,\}

    Averaged over global heads it is high at anchors: tokens that what follows keeps coming back to.

    Queries from which the model's own masks hide the key (a window shorter than the range) do not
    count.

    Values: ``(batch, head, key)`` by absolute token position, NaN where no query stands so far
    after the key. Over the forwards of a run the sums add up. Table: the mean over the keys that
    have a value.
    Cost: tiles.

    Args:
        low, high: of the range, in tokens; 10 and 50 as published for training; None: to the end of
            the text, as in the work's analysis.

    Source: Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained
    Policy Optimization, 2025 (arXiv 2510.13554); equations read.
    """

    name: ClassVar[str] = "future_influence"
    over: ClassVar[str] = "key"
    sampled: ClassVar[bool | None] = False  # a sample may hold no query of a short range
    low: int = 10
    high: int | None = 50

    def __post_init__(self) -> None:
        ends = [self.low] if self.high is None else [self.low, self.high]
        whole = all(isinstance(n, int) and not isinstance(n, bool) for n in ends)
        if not whole or not 0 <= self.low <= ends[-1]:
            raise AttnbiasError(
                f"FutureInfluence(low, high) must be whole numbers 0 <= low <= high, or high None, "
                f"got {self.low!r}, {self.high!r}."
            )

    def channels(self, scene: Scene) -> int:
        return 2

    def tile(self, tile: Tile) -> Tensor:
        gap = tile.query_positions[:, :, None] - tile.key_positions[:, None, :]
        later = (gap >= self.low) & (tile.key_positions >= 0)[:, None]
        if self.high is not None:
            later &= gap <= self.high
        pairs = later[:, None] & tile.visible
        mass = (tile.probabilities.double() * pairs).sum(-2)
        return torch.stack([mass, pairs.sum(-2).to(mass).expand_as(mass)], -1)

    def finish(self, gathered: Gathered) -> Tensor:
        mass, count = gathered.sums.unbind(-1)
        return torch.where(count > 0, mass / count, torch.nan)
