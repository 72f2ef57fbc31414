"""What attention spread evenly over the visible tokens would give: the zero of every statistic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnbias.hub import Call, Site

ROWS = 256


@dataclass(frozen=True)
class Even:
    r"""Statistics of :math:`p_{ij} = [j\ \text{visible to}\ i] / n_i`, ``n_i`` visible tokens.

    Attributes:
        received: (keys,) the sum over the queries.
        entropy: mean of ``ln n_i`` in nats. distance: mean of ``|i - j|`` in tokens.
        causal: no query sees a later token.
    """

    received: Tensor
    queries: int
    entropy: float
    distance: float
    causal: bool


class Watch:
    """A participant that looks on: the even attention of each site, and a call after each."""

    role = "see"

    def __init__(self, wanted: set[Any], tick: Callable[[], None], measure: bool) -> None:
        self.found: dict[Site, Even] = {}
        self._wanted, self._tick, self._measure = wanted, tick, measure

    def begin_forward(self, forward: int) -> None:
        """Nothing to prepare."""

    def end_forward(self, forward: int) -> None:
        """Nothing to settle."""

    def see(self, call: Call, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        """Read the masks of one call; its tensors are not touched."""
        if self._measure and call.site in self._wanted:
            self.found[call.site] = even(call)
        self._tick()


def even(call: Call) -> Even:
    """Even attention under the masks of a call of one row; masks that differ by head are averaged.

    Sink logits are left out: all of the attention is spread over the tokens.

    Costs O(queries keys) time and O(256 keys heads) memory; only the masks' -inf entries count.
    """
    queries, keys = call.query.shape[2], call.key.shape[2]
    received = torch.zeros(keys, dtype=torch.float64)
    entropy = distance = 0.0
    causal = True
    where, places = call.query_positions[0].cpu(), call.key_positions[0].cpu()
    for start in range(0, queries, ROWS):
        rows = slice(start, min(start + ROWS, queries))
        visible = _visible(call, rows, keys)
        count = visible.sum(-1, keepdim=True).clamp_min(1)
        share = (visible / count).mean(0)
        gap = (where[rows, None] - places[None, :]).double()
        received += share.sum(0)
        distance += float((share * gap.abs()).sum())
        entropy += float(count.log().mean(0).sum())
        causal = causal and not bool((visible.any(0) & (gap < 0)).any())
    return Even(received, queries, entropy / queries, distance / queries, causal)


def _visible(call: Call, rows: slice, keys: int) -> Tensor:
    """(heads | 1, rows, keys) bool as float64."""
    size = rows.stop - rows.start
    if call.bias is None:
        return torch.ones(1, size, keys, dtype=torch.float64)
    block = call.bias.block(rows, slice(0, keys))
    return (block > -torch.inf)[0].expand(-1, size, keys).double().cpu()
