"""Attention that the queries of one part of the input give to each key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.exchange import exchanged
from attnbias.observe.scene import HIDDEN, Scene
from attnbias.observe.statistic import Gathered, Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Given(Statistic):
    r"""How the attention given by the queries of a span is spread over the keys.

    .. math:: G_j = \frac{\sum_{i \in g} p_{ij}}{\sum_{i \in g} \sum_k p_{ik}}

    For one query (the class token of a vision model, the last token of a prompt) this is its row of
    the map; for several, the mean of their rows. Under sink logits it is the spread over the keys
    that are shown. In cross-attention the span counts the positions of the queries.

    Values: ``(batch, head, key)`` by absolute token position of the key, a distribution; NaN where
    a row of the batch has no such key or no query in the span. Over the forwards of a run the sums
    of both add up.
    Table: the largest value of each row of the batch, as the mean over the rows (and runs).
    Cost: one unbiased call where masks and biases per key are all that is added (attention with
    queries and keys exchanged, other queries hidden), tiles otherwise.

    Args:
        span: the name of a span given to `observe`.
    """

    name: ClassVar[str] = "given"
    over: ClassVar[str] = "key"
    sampled: ClassVar[bool | None] = False  # a sample may hold no query of a short span
    span: str = "span"

    def __post_init__(self) -> None:
        if not isinstance(self.span, str) or not self.span:
            raise AttnbiasError(f"Given(span) must be the name of a span, got {self.span!r}.")

    def check(self, spans: tuple[str, ...]) -> None:
        if self.span not in spans:
            raise AttnbiasError(
                f"Given needs the span {self.span}, and observe() was given "
                f"{', '.join(spans) or 'none'}; write observe(..., spans={{{self.span!r}: "
                "(start, stop)}})."
            )

    def _asks(self, scene: Scene) -> Tensor:
        """(B, N) bool: the queries of the span."""
        span, at = scene.spans[self.span], scene.query_positions
        if span.dtype == torch.bool:
            known = (at >= 0) & (at < span.shape[1])
            return span.gather(1, torch.where(known, at, 0)) & known
        return (at >= span[:, :1]) & (at < span[:, 1:]) & (at >= 0)

    def tile(self, tile: Tile) -> Tensor:
        asks = self._asks(tile.scene)[tile.batch, tile.rows]
        return (tile.probabilities.double() * asks[:, None, :, None]).sum(-2)

    def plan(self, scene: Scene) -> bool:
        return not scene.terms("other")

    def fused(self, scene: Scene) -> Tensor:
        asks = scene.counted & self._asks(scene)[:, None]
        weight = torch.where(asks, -scene.lse, HIDDEN)
        found = exchanged(scene, scene.query, scene.key, weight, scene.terms("mask"))
        for term in scene.terms("key"):
            found = found + term.dense()[:, :, 0]
        return torch.exp(found)

    def finish(self, gathered: Gathered) -> Tensor:
        whole = gathered.sums.nansum(-1, keepdim=True)
        return torch.where(whole > 0, gathered.sums / whole, torch.nan)

    def summary(self, gathered: list[Gathered]) -> Tensor:
        tops = [self.finish(part).nan_to_num(-1).amax(-1) for part in gathered]
        flat = torch.cat(tops)
        return torch.where(flat >= 0, flat, torch.nan).nanmean(0)
