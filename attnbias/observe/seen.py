"""What was seen: tables, labelled tensors and files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.run import Run
from attnbias.observe.sampling import SampledRun, Sampler, estimated
from attnbias.observe.statistic import Statistic
from attnbias.observe.table import Row, Table

if TYPE_CHECKING:
    from attnbias.hub import Site


@dataclass(frozen=True)
class Labelled:
    """A tensor with named axes.

    Attributes:
        values: float64; NaN where an entry does not exist (a shorter run or row, a padding
            position).
        axes: the name of each axis, in order.
        labels: axis -> what its entries are: run and batch numbers, layer and head numbers,
            absolute token positions of "query" and "key", span names.
        name: the label of the statistic; tower: the tower it is of.
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: dict[str, list[Any]]
    name: str
    tower: str

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def select(self, **at: Any) -> Labelled:
        """One entry of some axes by its label, as in ``select(layer=3, head=0)``; those axes go
        away."""
        values, axes = self.values, list(self.axes)
        for axis, label in at.items():
            if axis not in axes or label not in self.labels[axis]:
                known = self.labels.get(axis, list(self.axes))
                raise AttnbiasError(f"{self.name} has no {axis} {label!r}; there is {known}.")
            values = values.select(axes.index(axis), self.labels[axis].index(label))
            axes.remove(axis)
        labels = {axis: self.labels[axis] for axis in axes}
        return Labelled(values, tuple(axes), labels, self.name, self.tower)


class Seen:
    """The result of `observe`; can be read inside the context and after it."""

    def __init__(
        self, statistics: list[Statistic], spans: dict[str, Any], sampler: Sampler | None = None
    ) -> None:
        self.statistics = statistics
        self.spans = spans
        self.sampler = sampler
        self._runs: dict[Site, list[Run]] = {}

    @property
    def sites(self) -> list[Site]:
        """Where something was seen."""
        return list(self._runs)

    @property
    def runs(self) -> int:
        """How many runs there were: prefills, each with the steps that continue it.

        A tower that a model calls several times in one forward (for each image, or each window of
        one) has a run for each of these calls.
        """
        return max((len(found) for found in self._runs.values()), default=0)

    def table(self, run: int | None = None) -> Table:
        """One row for each head and statistic: the mean over all real query positions of all rows.

        What a statistic shows instead where that mean says nothing is in its docstring. Runs are
        taken together; `run` picks one. Where queries were sampled, each row has the standard
        error of its value.
        """
        if run is not None and not 0 <= run < self.runs:
            raise AttnbiasError(f"run must be between 0 and {self.runs - 1}, got {run}.")
        rows = []
        for site, runs in self._runs.items():
            chosen = runs if run is None else runs[run : run + 1]
            for place, statistic in enumerate(self.statistics):
                rows += self._rows(site, chosen, place, statistic)
        return Table(rows, self._meta())

    def _rows(self, site: Site, runs: list[Run], place: int, statistic: Statistic) -> list[Row]:
        if not runs:
            return []
        values, unsure = self._values(runs, place, statistic)
        names = [statistic.label]
        if values.ndim == 2:  # an axis of its own: one line for each entry
            (entries,) = statistic.labels(tuple(self.spans)).values()
            names = [f"{statistic.name}[{entry}]" for entry in entries]
        columns = values.reshape(len(values), -1)
        spread = None if unsure is None else unsure.reshape(len(values), -1)
        return [
            Row(
                site.tower, site.layer, head, name, float(columns[head, at]),
                None if spread is None else float(spread[head, at]),
            )
            for at, name in enumerate(names)
            for head in range(len(columns))
        ]  # fmt: skip

    def _values(
        self, runs: list[Run], place: int, statistic: Statistic
    ) -> tuple[Tensor, Tensor | None]:
        """(heads[, entries]): the summaries, and standard errors where queries are sampled."""
        drawn = any(isinstance(r, SampledRun) and r.drawn[place] for r in runs)
        if self.sampler is not None and drawn:
            return estimated(statistic, runs, place, self.sampler.signs)
        values = statistic.summary([r.gathered(place) for r in runs]).double().cpu()
        if self.sampler is None:
            return values, None
        return values, torch.where(values.isnan(), torch.nan, 0.0)

    def tensor(self, name: str, tower: str | None = None) -> Labelled:
        """The values of a statistic with the axes ("run", "layer", "batch", "head", ...).

        Where queries were sampled, those not drawn are NaN, and sums over queries are estimates.

        Args:
            name: label (``"received[queries]"``) or name (``"received"``) of a statistic.
            tower: which part of the model; needed where several were seen.
        """
        place = self._place(name)
        statistic, tower = self.statistics[place], self._tower(tower)
        sites = [s for s in self._runs if s.tower == tower]
        runs = max(len(self._runs[s]) for s in sites)
        blocks: list[list[Tensor | None]] = [[None] * len(sites) for _ in range(runs)]
        for column, site in enumerate(sites):
            for number, run in enumerate(self._runs[site]):
                blocks[number][column] = statistic.finish(run.gathered(place)).double().cpu()
        flat = _stacked([block for line in blocks for block in line])
        values = flat.reshape(runs, len(sites), *flat.shape[1:])
        axes = ("run", "layer", "batch", "head", *statistic.axes())
        own = statistic.labels(tuple(self.spans))
        labels: dict[str, list[Any]] = {
            axis: list(own.get(axis, range(size)))
            for axis, size in zip(axes, values.shape, strict=True)
        }
        labels["layer"] = [s.layer for s in sites]
        return Labelled(values, axes, labels, statistic.label, tower)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as ``.csv`` or ``.json``, whole or not at all; see `Table` for the
        schema."""
        self.table().save(path)

    def __str__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()

    def _place(self, name: str) -> int:
        labels = [s.label for s in self.statistics]
        if name in labels:
            return labels.index(name)
        same = [place for place, s in enumerate(self.statistics) if s.name == name]
        if len(same) != 1:
            raise AttnbiasError(
                f"{name!r} is {'none' if not same else 'more than one'} of the statistics "
                f"observed: {', '.join(labels)}."
            )
        return same[0]

    def _tower(self, tower: str | None) -> str:
        towers = list(dict.fromkeys(s.tower for s in self._runs))
        if not towers:
            raise AttnbiasError("nothing was seen yet: run the model inside the context.")
        if tower is None and len(towers) == 1:
            return towers[0]
        if tower not in towers:
            raise AttnbiasError(f"tower must be one of {', '.join(towers)}, got {tower!r}.")
        return tower

    def _meta(self) -> dict[str, Any]:
        drawn = {} if self.sampler is None else {"queries": self.sampler.queries}
        return {
            **drawn,
            "statistics": [
                {"label": s.label, "name": s.name, "parameters": s.parameters()}
                for s in self.statistics
            ],
            "spans": {n: _plain(s) for n, s in self.spans.items()},
            "runs": [
                [
                    {"tower": s.tower, "layer": s.layer, "module": s.name, **r[n].size()}
                    for s, r in self._runs.items()
                    if n < len(r)
                ]
                for n in range(self.runs)
            ],
        }


def _plain(span: Any) -> Any:
    if isinstance(span, Tensor):
        return [row.nonzero()[:, 0].tolist() for row in span]
    return span if isinstance(span, list) else list(span)


def _stacked(blocks: Sequence[Tensor | None]) -> Tensor:
    """One tensor of blocks of different sizes, NaN where a block has no entry."""
    have = [b for b in blocks if b is not None]
    shape = [max(b.shape[d] for b in have) for d in range(have[0].ndim)]
    out = torch.full((len(blocks), *shape), torch.nan, dtype=torch.float64)
    for place, block in enumerate(blocks):
        if block is not None:
            _corner(out[place], block.shape).copy_(block)
    return out


def _corner(whole: Tensor, shape: torch.Size) -> Tensor:
    for dim, size in enumerate(shape):
        whole = whole.narrow(dim, 0, size)
    return whole
