"""A call with only some of its queries, each row of the batch its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.errors import Refused
from attnbias.observe.scene import one

if TYPE_CHECKING:
    from attnbias.hub import Call


class Rows(Bias):
    """Chosen rows of a bias: element b shows rows ``slots[b]`` of the batch row ``owner[b]``."""

    def __init__(
        self,
        bias: Bias,
        slots: Tensor,
        owner: Tensor,
        cols: slice | None = None,
        kept: dict[str, Any] | None = None,
    ) -> None:
        self.bias, self.slots, self.owner = bias, slots, owner
        self.cols = slice(0, bias.keys) if cols is None else cols  # of the whole bias
        self.queries, self.keys = slots.shape[1], self.cols.stop - self.cols.start
        self.is_mask, self.may_mask = bias.is_mask, bias.may_mask
        self._kept = {} if kept is None else kept

    @property
    def batch(self) -> int:
        return len(self.slots)

    @property
    def heads(self) -> int:
        return self.bias.heads

    def block(self, rows: slice, cols: slice) -> Tensor:
        keys = slice(self.cols.start + cols.start, self.cols.start + cols.stop)
        where = (self.owner.tolist(), self.slots[:, rows].tolist(), keys.start, keys.stop)
        shared = self.bias.heads == 1  # then the heads ask for the same block one after the other
        if shared and self._kept.get("where") == where:
            return self._kept["block"]  # type: ignore[no-any-return]
        parts = []
        for owner, slots in zip(where[0], where[1], strict=True):
            part = self.bias[one(self.bias.batch, owner), :, :, :]
            lines = [_lines(part, slice(*run), keys) for run in _runs(slots)]
            parts.append(torch.cat(lines, 2))
        block = torch.cat(parts)
        if shared:
            self._kept.update(where=where, block=block)
        return block

    def dense(self) -> Tensor:
        return self.block(slice(0, self.slots.shape[1]), slice(0, self.cols.stop - self.cols.start))

    def span(self, rows: slice) -> tuple[int, int]:
        at = self.slots[:, rows]
        at = at[at >= 0]
        if at.numel() == 0:
            return (0, 0)
        found = self.bias.span(slice(int(at.min()), int(at.max()) + 1))
        low, high = (min(max(end, self.cols.start), self.cols.stop) for end in found)
        return (low - self.cols.start, high - self.cols.start)

    def _select(self, batch: slice, heads: slice, rows: slice, cols: slice) -> Bias:
        inner = self.bias[:, heads, :, :] if self.bias.heads > 1 else self.bias
        keys = slice(self.cols.start + cols.start, self.cols.start + cols.stop)
        return Rows(inner, self.slots[batch][:, rows], self.owner[batch], keys, self._kept)

    def transpose(self) -> Bias:
        raise Refused("chosen rows of a bias have no transpose.")

    def _scaled(self, factor: float | Tensor) -> Bias:
        return Rows(self.bias._scaled(factor), self.slots, self.owner, self.cols)


def _lines(bias: Bias, rows: slice, cols: slice) -> Tensor:
    """(1, heads, rows, cols) of a bias, also of one that is the same for all queries."""
    found = bias.block(rows, cols)
    return found.expand(1, bias.heads, rows.stop - rows.start, cols.stop - cols.start)


def _runs(slots: list[int]) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of slots that follow each other; padding reads row 0, which counts not."""
    start = stop = None
    for slot in (max(s, 0) for s in slots):
        if start is not None and slot == stop:
            stop = slot + 1
            continue
        if start is not None and stop is not None:
            yield start, stop
        start, stop = slot, slot + 1
    if start is not None and stop is not None:
        yield start, stop


class Part:
    """What a `Scene` reads of a call, at chosen query slots: element b is of row `owner[b]`."""

    def __init__(self, call: Call, slots: Tensor, owner: Tensor) -> None:
        at = slots.clamp_min(0)
        query = call.query[owner]
        place = at[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        self.site, self.scale, self.sink = call.site, call.scale, call.sink
        self.query = query.gather(2, place)
        self.key, self.value = _owned(call.key, owner), _owned(call.value, owner)
        self.bias = chosen(call.bias, slots, owner)
        positions = call.query_positions.expand(call.query.shape[0], -1)[owner].gather(1, at)
        self.query_positions = torch.where(slots >= 0, positions, -1)
        self.key_positions = call.key_positions.expand(call.query.shape[0], -1)[owner]


def _owned(given: Tensor, owner: Tensor) -> Tensor:
    """(elements, ...) rows of the batch; one row is seen as often as wanted, and not copied."""
    if len(given) > 1:
        return given[owner]
    # A scene reads float32 or better, and a change of dtype after `expand` would copy.
    wide = given if given.dtype == torch.float64 else given.float()
    return wide.expand(len(owner), *given.shape[1:])


def chosen(bias: Bias | None, slots: Tensor, owner: Tensor) -> Bias | None:
    """A bias at the rows drawn; a term that is the same for all queries stays as it is."""
    if bias is None:
        return None
    terms = []
    for term in bias.terms():
        plain = term.queries is None and term.batch == 1
        terms.append(term if plain else Rows(term, slots, owner))
    return sum(terms[1:], terms[0])
