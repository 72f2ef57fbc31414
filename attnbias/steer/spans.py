"""How named spans and chosen positions become keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.rule import is_number

FIRST = "first"  # position 0 of every row, without being passed


@dataclass(frozen=True)
class Range:
    """Token positions from `start` up to, not including, `stop`; None is without end."""

    start: int
    stop: int | None

    def __post_init__(self) -> None:
        good = is_number(self.start) and (self.stop is None or is_number(self.stop))
        if not good or (self.stop is not None and self.stop <= self.start):
            raise AttnbiasError(
                "a range of tokens must have 0 <= start < stop, got "
                f"start {self.start!r}, stop {self.stop!r}."
            )


Keys = tuple[str | int | Range, ...]


def keys_of(value: Any) -> Keys:
    """Chosen keys as names, absolute token positions and ranges.

    Takes a name, a position, a Python ``range``, a `Range`, or a list of these.
    """
    one = isinstance(value, (str, int, range, Range))
    items = [value] if one else list(value) if isinstance(value, Iterable) else []
    kept: list[str | int | Range] = []
    for item in items:
        if isinstance(item, range) and item.step == 1 and len(item):
            item = Range(item.start, item.stop)
        if not (isinstance(item, (str, Range)) or is_number(item)) or item == "":
            raise AttnbiasError(
                "keys must be token positions from 0, ranges or names of spans such as 'first', "
                f"got {item!r}."
            )
        kept.append(item)
    if not kept:
        raise AttnbiasError(f"keys must name at least one key, got {value!r}.")
    return tuple(kept)


class Spans:
    """Named spans of token positions, one for all rows of a batch or one per row.

    Args:
        given: name -> ``(start, stop)`` or a list of these, one per row of the batch that the user
            passed. Positions count the real tokens of a row from 0; a stop of None is without end.
            None in a list: the row has no such span.
    """

    def __init__(self, given: Mapping[str, Any] | None) -> None:
        self._rows: dict[str, list[tuple[int, int | None]]] = {}
        for name, value in (given or {}).items():
            rows = [value] if _is_span(value) else list(value) if _is_list(value) else []
            if not rows or not all(row is None or _is_span(row) for row in rows):
                raise AttnbiasError(
                    f"spans[{name!r}] must be (start, stop) with 0 <= start <= stop, or a list with"
                    f" one per row, got {value!r}."
                )
            self._rows[name] = [(0, 0) if row is None else (row[0], row[1]) for row in rows]
        counts = {len(rows) for rows in self._rows.values() if len(rows) > 1}
        if len(counts) > 1:
            raise AttnbiasError(
                f"spans must all have one entry or one per row, got lists of {sorted(counts)}."
            )

    def __contains__(self, name: object) -> bool:
        return name == FIRST or name in self._rows

    def row(self, number: int, batch: int) -> Spans:
        """The spans of one row of a batch."""
        found = Spans(None)
        for name, rows in self._rows.items():
            if batch % len(rows):
                self.member(name, torch.zeros(batch, 1, dtype=torch.long), batch)  # refuses
            found._rows[name] = [rows[number * len(rows) // batch]]
        return found

    @property
    def given(self) -> frozenset[str]:
        """The names that the user gave."""
        return frozenset(self._rows)

    def names(self) -> list[str]:
        return sorted({FIRST, *self._rows})

    def without(self, names: Sequence[str], batch: int, cut: Spans) -> Spans:
        """These spans in texts from which the spans `names` of `cut` are taken out."""
        gone: list[set[int]] = []
        for row in range(batch):
            lost: set[int] = set()
            for name in names:
                start, stop = cut._row(name, row, batch)
                if stop is None:
                    raise AttnbiasError(
                        f"the span {name!r} has no end, so it cannot be left out of a prompt."
                    )
                lost.update(range(start, stop))
            gone.append(lost)
        made = Spans(None)
        for name in {FIRST, *self._rows} if any(0 in lost for lost in gone) else self._rows:
            rows = []
            for row, lost in enumerate(gone):
                start, stop = self._row(name, row, batch)
                ends = stop if stop is None else stop - sum(place < stop for place in lost)
                rows.append((start - sum(place < start for place in lost), ends))
            made._rows[name] = rows
        return made

    def _row(self, name: str, row: int, batch: int) -> tuple[int, int | None]:
        rows = self._rows.get(name, [(0, 1)])
        if batch % len(rows):
            raise Refused(
                f"the span {name!r} was given for {len(rows)} rows and the model runs {batch}: give"
                " one (start, stop) for all rows, or one per prompt."
            )
        return rows[row // (batch // len(rows))]

    def chosen(self, keys: Keys, positions: Tensor, batch: int) -> Tensor:
        """Which of `positions` ``(batch | 1, length)`` are chosen: bool ``(batch | 1, length)``."""
        found = torch.zeros_like(positions, dtype=torch.bool)
        for item in keys:
            if isinstance(item, str):
                found = found | self.member(item, positions, batch)
            elif isinstance(item, Range):
                inside = positions >= item.start
                if item.stop is not None:
                    inside = inside & (positions < item.stop)
                found = found | inside
            else:
                found = found | (positions == item)
        return found

    def member(self, name: str, positions: Tensor, batch: int) -> Tensor:
        """Which of `positions` ``(batch | 1, keys)`` lie in a span: bool ``(batch | 1, keys)``.

        Under beams and several returned sequences a model repeats each row of the prompt in place,
        and beams only ever change places inside their own prompt: so do the spans.
        """
        rows = self._rows.get(name, [(0, 1)])
        if batch % len(rows):
            raise Refused(
                f"the span {name!r} was given for {len(rows)} rows and the model runs {batch}: give"
                " one (start, stop) for all rows, or one per prompt."
            )
        device = positions.device
        start = torch.tensor([row[0] for row in rows], device=device)
        stops = [torch.iinfo(torch.int64).max if row[1] is None else row[1] for row in rows]
        stop = torch.tensor(stops, device=device)
        if len(rows) > 1:
            start, stop = (t.repeat_interleave(batch // len(rows)) for t in (start, stop))
        return (positions >= start[:, None]) & (positions < stop[:, None]) & (positions >= 0)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_span(value: Any) -> bool:
    return (
        _is_list(value)
        and len(value) == 2
        and is_number(value[0])
        and (value[1] is None or (is_number(value[1]) and value[1] >= value[0]))
    )
