"""The abstract statistic, and what is gathered of one over the forwards of a run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.scene import Scene
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Gathered:
    """What one statistic has summed over the forwards of one run, at one site.

    Attributes:
        sums: (batch, heads, positions[, channels]) by absolute token position (of queries or of
            keys); NaN where a row of the batch has no such position, or its query sees nothing.
            (batch, heads, channels) for a statistic over the sequence.
        queries: (batch, heads): how many queries were counted (tokens that see at least one key).
        weights: (batch, positions) how many queries each stands for, where queries were sampled;
            None where every query stands for itself. Sums over keys or the sequence are scaled up
            already.
    """

    sums: Tensor
    queries: Tensor
    weights: Tensor | None = None

    def total(self) -> Tensor:
        """(batch, heads[, channels]): the sum over query positions, each as what it stands for."""
        if self.weights is None:
            return self.sums.nansum(2)
        shape = (len(self.weights), 1, -1, *(1,) * (self.sums.ndim - 3))
        return (self.sums.nan_to_num(0.0) * self.weights.view(shape)).sum(2)


class Statistic(ABC):
    """A number about attention, for each head, from sums over the map.

    A statistic says what one tile adds (`tile`). Where one more fused call gives the same sums it
    says so in `plan` and computes them in `fused`. `finish` turns the sums of a run into values,
    `summary` into the one number for each head that the table shows.

    Subclasses are frozen dataclasses: fields are the parameters, checked in ``__post_init__``.

    Attributes:
        name: the word for the statistic in tables and files, lower case.
        over: "query" or "key": what the sums run along; "sequence": one sum for all queries and
            keys, with channels (a profile by lag, an image of offsets).
    """

    name: ClassVar[str]
    over: ClassVar[str] = "query"
    gives_lse: ClassVar[bool] = False  # the fused form finds the log-sum-exp on its way
    # What `fused` reads that one compiled sweep over the map finds as well, for any bias: of
    # "columns", "inner", "gap", "peak" and "features" (those asked for in `plan`).
    swept: ClassVar[tuple[str, ...]] = ()
    # Whether a sample of the queries will do. None: yes, unless there is a `summary` of its own
    # over queries; True: that summary heeds `Gathered.weights`; False: never (few queries count).
    sampled: ClassVar[bool | None] = None

    @property
    def label(self) -> str:
        """The name, with the parameters that are not at their default: ``received[queries]``."""
        changed = [
            getattr(self, f.name)
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        words = [", ".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in changed]
        return f"{self.name}[{', '.join(words)}]" if words else self.name

    def parameters(self) -> dict[str, object]:
        """The fields, for files."""
        return {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]

    def check(self, spans: tuple[str, ...]) -> None:  # noqa: B027 - most need nothing
        """Raise where the spans given to `observe` are not enough."""

    @property
    def aims(self) -> tuple[str, ...]:
        """Names of the targets that must be given to `observe`."""
        return ()

    def channels(self, scene: Scene) -> int | None:
        """Number of sums for each position; None for one, without an axis of its own."""
        return None

    @abstractmethod
    def tile(self, tile: Tile) -> Tensor:
        """What a tile adds: (b, h, r[, channels]) over queries, (b, h, c[, channels]) over keys,
        (b, h, channels) over the sequence.

        Must add up: the sums of the parts of a tile, cut along queries or keys, are the sums of the
        tile. NaN says that an entry does not exist. A statistic that does not add up (a largest
        entry) gives `start` a state of its own.
        """

    def plan(self, scene: Scene) -> bool:
        """Whether `fused` can be called on this scene; features are asked for here."""
        return False

    def fused(self, scene: Scene) -> Tensor:
        """The sums of the whole call, as `tile` would give them: (B, H, N | M[, channels])."""
        raise NotImplementedError(f"{self.name} has no fused form")

    def light(self, scene: Scene) -> bool:
        """Whether `fused` costs O(N) only, so that it pays even when tiles are built anyway."""
        return False

    def finish(self, gathered: Gathered) -> Tensor:
        """The values of a run from its sums; by default the sums."""
        return gathered.sums

    def axes(self) -> tuple[str, ...]:
        """The axes of what `finish` gives, after ("batch", "head")."""
        return () if self.over == "sequence" else (self.over,)

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        """The names along axes of its own."""
        return {}

    def summary(self, gathered: list[Gathered]) -> Tensor:
        """(heads[, channels]): by default the mean over all real queries of all rows and runs."""
        values = [self.finish(g).movedim(1, 0) for g in gathered]
        flat = values if self.over == "sequence" else [v.flatten(1, 2) for v in values]
        if all(g.weights is None for g in gathered):
            return torch.nanmean(torch.cat(flat, 1), 1)
        stands = torch.cat([_stands(g) for g in gathered])
        return _mean(torch.cat(flat, 1), stands)

    def start(self, scene: Scene) -> State:
        """An empty state for the tiles of one call."""
        return State(self, scene)


def _stands(gathered: Gathered) -> Tensor:
    """(batch x positions): how many queries each position stands for."""
    if gathered.weights is not None:
        return gathered.weights.flatten()
    size = gathered.sums.shape[0] * gathered.sums.shape[2]
    return gathered.sums.new_ones(size)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of (heads, entries[, channels]) over the entries that are there."""
    weights = weights.view(1, -1, *(1,) * (values.ndim - 2)).expand_as(values)
    weights = torch.where(values.isnan(), 0.0, weights)
    return (values.nan_to_num(0.0) * weights).sum(1) / weights.sum(1)


class State:
    """The sums of one statistic over the tiles of one call: O(queries) or O(keys) memory.

    Tiles may come in any order and cutting; two states of the same call merge by addition.
    """

    def __init__(self, statistic: Statistic, scene: Scene) -> None:
        lengths = {"query": (scene.queries,), "key": (scene.keys,), "sequence": ()}
        channels = statistic.channels(scene)
        own = () if channels is None else (channels,)
        shape = (scene.batch, scene.heads, *lengths[statistic.over], *own)
        self.statistic = statistic
        # Double precision: many tiles are added, and small numbers to large ones.
        self.sums = torch.zeros(shape, dtype=torch.float64, device=scene.device)

    def update(self, tile: Tile) -> None:
        """Add a tile."""
        found = self.statistic.tile(tile)
        if self.statistic.over == "sequence":
            self.sums[tile.batch, tile.heads] += found
            return
        along = tile.rows if self.statistic.over == "query" else tile.cols
        self.sums[tile.batch, tile.heads, along] += found

    def merge(self, other: State) -> None:
        """Add the sums of other tiles of the same call."""
        if other.statistic != self.statistic or other.sums.shape != self.sums.shape:
            raise AttnbiasError(
                f"a state of {self.statistic.label} merges with states of the same statistic and "
                f"call, got one of {other.statistic.label} of shape {tuple(other.sums.shape)}."
            )
        self.sums += other.sums

    def result(self) -> Tensor:
        """The sums: (B, H, N | M[, channels])."""
        return self.sums


def measure(scene: Scene, statistics: list[Statistic], *, fused: bool = True) -> list[Tensor]:
    """The sums of several statistics over one call; calls, sweeps and tiles are shared."""
    ready = [fused and s.plan(scene) for s in statistics]
    wanted = {name for s in statistics for name in s.swept}
    if fused and wanted and scene.sweep(wanted):
        ready = [r or bool(s.swept) for r, s in zip(ready, statistics, strict=True)]
    elif not all(ready):  # tiles are built anyway: only what costs nothing beside them stays fused
        ready = [r and s.light(scene) for r, s in zip(ready, statistics, strict=True)]
    states = {i: s.start(scene) for i, s in enumerate(statistics) if not ready[i]}
    if states:
        from attnbias.observe.tiles import tiles

        for tile in tiles(scene):
            for state in states.values():
                state.update(tile)
    found: dict[int, Tensor] = {i: s.result() for i, s in states.items()}
    # What yields the log-sum-exp on its way goes first.
    order = sorted(
        (i for i in range(len(statistics)) if ready[i]), key=lambda i: not statistics[i].gives_lse
    )
    for i in order:
        found[i] = statistics[i].fused(scene)
    return [found[i] for i in range(len(statistics))]
