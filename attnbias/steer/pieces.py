"""Attention over parts of the keys: stretches, a few scattered keys, all keys but some.

Each piece is one call of the fused operator, with its log-sum-exp: pieces of disjoint keys are
joined by weighing their outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attnbias.bias import Bias, KeyBias, Padding, Window, add
from attnbias.lowering.flash import flash
from attnbias.steer.placing import take

if TYPE_CHECKING:
    from attnbias.steer.edit import Edit


class Piece(NamedTuple):
    """Attention of some rows over some keys of one group.

    Attributes:
        group: its number. rows: which, counted from the first row that is computed.
        out: ``(batch, heads, rows, value size)``. lse: ``(batch, heads, rows)``, -inf where a row
            sees none of these keys.
    """

    group: int
    rows: slice
    out: Tensor
    lse: Tensor


class Described(NamedTuple):
    """The bias of a call: causal from a position on (or not), and what is added per key.

    keys: ``(batch | 1, heads | 1, keys)`` in float32 (float64), or None.
    """

    offset: int | None
    keys: Tensor | None


def described(edit: Edit, heads: Sequence[int]) -> Described | None:
    """The biases of a call and of the rules, None where they are more than that."""
    offset: int | None = None
    rest: list[Bias] = []
    for bias in (edit.call.bias, edit.biases):
        for term in [] if bias is None else bias.terms():
            causal = isinstance(term, Window) and term.before is None and term.after == 0
            if causal and offset is None:
                offset = term.offset
            elif isinstance(term, (KeyBias, Padding)):
                rest.append(take(term, heads, edit.shape[1]))
            else:
                return None
    return Described(offset, add(*rest).dense()[:, :, 0] if rest else None)


@dataclass(frozen=True)
class Part:
    """Query, key and value of some rows of the batch and some heads, with the biases of the call.

    offset: the key at which the first row stands, where the call is causal. row: what is added per
    key, ``(batch | 1, heads | 1, keys)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    offset: int | None
    row: Tensor | None
    scale: float

    def later(self, first: int) -> Part:
        """The same without the rows before `first`."""
        if not first:
            return self
        offset = None if self.offset is None else self.offset + first
        query = self.query[:, :, first:]
        return Part(query, self.key, self.value, offset, self.row, self.scale)

    def of(self, batch: int, head: int) -> Part:
        """One row of the batch and one head."""
        owner = head // (self.query.shape[1] // self.key.shape[1])
        row = self.row
        if row is not None:
            places = zip(row.shape[:2], (batch, head), strict=True)
            b, h = (0 if size == 1 else at for size, at in places)
            row = row[b : b + 1, h : h + 1]
        one = slice(batch, batch + 1)
        key, value = (t[one, owner : owner + 1] for t in (self.key, self.value))
        return Part(self.query[one, head : head + 1], key, value, self.offset, row, self.scale)

    def stretch(self, group: int, start: int, stop: int, hidden: Tensor | None) -> list[Piece]:
        """Keys that follow each other, without those that are hidden (bool ``(keys)``)."""
        offset, queries = self.offset, self.query.shape[2]
        every = slice(0, queries)
        if offset is None:
            return [self._piece(group, every, slice(start, stop), False, hidden)]
        found = []
        if start < offset:  # before the first row: seen by all
            found.append(self._piece(group, every, slice(start, min(stop, offset)), False, hidden))
        first, last = max(start, offset) - offset, min(stop - offset, queries)
        if first < last:
            cols = slice(first + offset, last + offset)
            found.append(self._piece(group, slice(first, last), cols, True, hidden))
            if last < queries:
                found.append(self._piece(group, slice(last, queries), cols, False, hidden))
        return found

    def all_but(self, group: int, hidden: Tensor) -> list[Piece]:
        """All keys but some: hidden ``(keys)`` or ``(batch | 1, heads | 1, keys)``."""
        return self.stretch(group, 0, self.key.shape[2], hidden)

    def picked(self, group: int, index: Tensor) -> list[Piece]:
        """A few scattered keys, by number in rising order."""
        queries, count = self.query.shape[2], len(index)
        if not count:
            return []
        kind = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        mask: Tensor | None = None
        if self.offset is not None and int(index[-1]) > self.offset:
            places = torch.arange(queries, device=index.device) + self.offset
            mask = torch.zeros(1, 1, queries, count, dtype=kind, device=index.device)
            mask.masked_fill_(index > places[:, None], -torch.inf)
        if self.row is not None:
            row = self.row.index_select(-1, index)[:, :, None].to(kind)
            mask = row if mask is None else mask + row
        key, value = self.key.index_select(2, index), self.value.index_select(2, index)
        out, lse = flash(self.query, key, value, mask=mask, scale=self.scale)
        return [Piece(group, slice(0, queries), out, lse)]

    def rows(self, index: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of a few rows over all keys but those that are hidden, ``(batch |
        1, heads | 1, keys)``.
        """
        kind = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        keys = torch.arange(self.key.shape[2], device=index.device)
        gone = hidden[:, :, None]
        if self.offset is not None:
            gone = gone | (keys > index[:, None] + self.offset)
        mask = torch.zeros(gone.shape, dtype=kind, device=index.device)
        mask = mask.masked_fill_(gone, -torch.inf)
        if self.row is not None:
            mask = mask + self.row[:, :, None].to(kind)
        query = self.query.index_select(2, index)
        return flash(query, self.key, self.value, mask=mask, scale=self.scale)

    def _piece(
        self, group: int, rows: slice, cols: slice, causal: bool, hidden: Tensor | None
    ) -> Piece:
        kind = torch.float64 if self.query.dtype == torch.float64 else torch.float32
        mask = None if self.row is None else self.row[..., cols].to(kind)
        if hidden is not None and bool((gone := hidden[..., cols]).any()):
            mask = torch.zeros((1, 1, 1), dtype=kind, device=gone.device) if mask is None else mask
            mask = mask.expand(*mask.shape[:2], gone.shape[-1])
            gone = gone.reshape((1,) * (3 - gone.ndim) + tuple(gone.shape))
            mask = torch.where(gone, -torch.inf, mask)
        query, key, value = self.query[:, :, rows], self.key[:, :, cols], self.value[:, :, cols]
        mask = None if mask is None else mask[:, :, None]
        out, lse = flash(query, key, value, mask=mask, causal=causal, scale=self.scale)
        return Piece(group, rows, out, lse)
