"""What attention spread evenly over the visible tokens would give: the zero of every statistic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.bias import Dense
from attnbias.observe.run import Run
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic, measure

if TYPE_CHECKING:
    from attnbias.hub import Call, Site

WIDTH = 8


@dataclass(frozen=True)
class Even:
    r"""Statistics of :math:`p_{ij} = [j\ \text{visible to}\ i] / n_i`, ``n_i`` visible tokens.

    Attributes:
        received: (keys,) the sum over the queries. queries: how many there are.
        values: for each line of the table of `observe`, its value; for a statistic with an axis of
            its own also all of its values under its label.
        causal: no query sees a later token.
    """

    received: Tensor
    queries: int
    values: dict[str, float]
    rows: dict[str, tuple[float, ...]]
    causal: bool


class Watch:
    """A participant that looks on: the even attention of each site, and a call after each."""

    role = "see"

    def __init__(
        self,
        wanted: set[Any],
        tick: Callable[[], None],
        statistics: Sequence[Statistic] | None,
        spans: Mapping[str, Any] | None = None,
    ) -> None:
        self.found: dict[Site, Even] = {}
        self._wanted, self._tick = wanted, tick
        self._statistics, self._spans = statistics, dict(spans or {})

    def begin_forward(self, forward: int) -> None:
        """Nothing to prepare."""

    def end_forward(self, forward: int) -> None:
        """Nothing to settle."""

    def see(self, call: Call, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        """Read the masks of one call; its tensors are not touched."""
        if self._statistics is not None and call.site in self._wanted:
            with torch.no_grad(), torch.autocast(call.query.device.type, enabled=False):
                self.found[call.site] = even(call, self._statistics, self._spans)
        self._tick()


def even(call: Call, statistics: Sequence[Statistic], spans: Mapping[str, Any]) -> Even:
    """Every statistic of even attention under the masks of a call of one row.

    All scores are zero and only the masks stay, so one head says it for all; masks that differ by
    head are averaged. Sink logits are left out: all of the attention is spread over the tokens.
    """
    float(call.scale)  # verified now, on the call as it is, and not on the changed one below
    heads = 1 if call.bias is None else call.bias.heads
    sizes = (call.query.shape[2], call.key.shape[2])
    query, key = (
        torch.zeros(1, heads, n, WIDTH, dtype=torch.float64, device=call.query.device)
        for n in sizes
    )
    scene = Scene(call.with_vectors(query, key, key), None, None, spans)
    scene.sink = None
    masks = [_mask(t) for t in ([] if scene.own is None else scene.own.terms())]
    scene.bias = sum(masks[1:], masks[0]) if masks else None
    found = measure(scene, list(statistics))
    run = Run(list(statistics), scene)
    run.add(scene, found)
    values: dict[str, float] = {}
    rows: dict[str, tuple[float, ...]] = {}
    for place, statistic in enumerate(statistics):
        mean = statistic.summary([run.gathered(place)]).double().nanmean(0)
        if mean.ndim == 0:
            values[statistic.label] = float(mean)
            continue
        (entries,) = statistic.labels(tuple(spans)).values()
        rows[statistic.label] = tuple(mean.tolist())
        values |= {
            f"{statistic.name}[{name}]": float(x) for name, x in zip(entries, mean, strict=True)
        }
    received = scene.columns[0].double().mean(0).cpu()
    return Even(received, call.query.shape[2], values, rows, _causal(scene))


def _mask(term: Any) -> Any:
    """A term as a mask: hidden stays hidden, everything else is 0."""
    if term.is_mask:
        return term
    dense = term.dense()
    return Dense(torch.where(dense == -torch.inf, -torch.inf, 0.0).to(dense))


def _causal(scene: Scene) -> bool:
    """Whether no query sees a later token; dense masks are read in blocks."""
    if scene.bias is None or scene.site.kind != "self":
        return scene.queries == 1
    if scene.causal:
        return True
    where, places = scene.query_positions[0], scene.key_positions[0]
    for start in range(0, scene.queries, 256):
        rows = slice(start, min(start + 256, scene.queries))
        later = places[None, :] > where[rows, None]
        shown = scene.bias.block(rows, slice(0, scene.keys))[0] > -torch.inf
        if bool((shown & later).any()):
            return False
    return True
