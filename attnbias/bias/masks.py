"""Masks: biases whose entries are zero (visible) or minus infinity (hidden)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnbias.bias.base import Bias, check_positive, length, narrow, to_mask
from attnbias.bias.dense import Dense
from attnbias.errors import AttnbiasError

# ``(low, high)``: visible where ``low <= j - i <= high``; None is unlimited.
Band = tuple[int | None, int | None]


class Mask(Bias):
    """What masks share: entries are 0 or minus infinity, so a positive factor changes nothing."""

    is_mask = True
    may_mask = True

    @property
    def batch(self) -> int:
        return 1

    @property
    def heads(self) -> int:
        return 1

    def _scaled(self, factor: float | Tensor) -> Bias:
        check_positive(factor, type(self).__name__)
        return self


class Window(Mask):
    """Visible where ``-before <= j - (i + offset) <= after``. Memory O(1); tiles outside are
    skipped.

    Args:
        before, after: number of keys seen before and after the query's own position; None is
            unlimited.
        queries, keys: the lengths.
        offset: position of query 0 minus position of key 0; by default ``keys - queries``.
    """

    queries: int
    keys: int
    offset: int

    def __init__(
        self,
        before: int | None,
        after: int | None,
        *,
        queries: int,
        keys: int,
        offset: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.before, self.after = before, after
        self.queries, self.keys = queries, keys
        self.offset = keys - queries if offset is None else offset
        self.device = device

    def band(self) -> Band:
        """The window by index, with the offset in it."""
        low = None if self.before is None else self.offset - self.before
        high = None if self.after is None else self.offset + self.after
        return low, high

    def __repr__(self) -> str:
        if (self.before, self.after) == (None, 0):
            return f"Causal({self.queries}, {self.keys}, offset={self.offset})"
        sides = f"before={self.before}, after={self.after}"
        return f"Window({sides}, {self.queries}, {self.keys}, offset={self.offset})"

    def dense(self) -> Tensor:
        tile = torch.zeros(1, 1, self.queries, self.keys, device=self.device)
        return hide_outside(tile, *self.band())

    def span(self, rows: slice) -> tuple[int, int]:
        low, high = self.band()
        first = 0 if low is None else min(max(rows.start + low, 0), self.keys)
        last = self.keys if high is None else min(max(rows.stop - 1 + high + 1, 0), self.keys)
        return (first, max(first, last))

    def transpose(self) -> Bias:
        return Window(
            self.after,
            self.before,
            queries=self.keys,
            keys=self.queries,
            offset=-self.offset,
            device=self.device,
        )

    def _select(self, batch: slice, heads: slice, rows: slice, cols: slice) -> Bias:
        return Window(
            self.before,
            self.after,
            queries=length(rows),
            keys=length(cols),
            offset=self.offset + rows.start - cols.start,
            device=self.device,
        )

    def _merge(self, other: Bias) -> Bias | None:
        same = isinstance(other, Window) and (other.queries, other.keys) == (
            self.queries,
            self.keys,
        )
        if not same:
            return None
        assert isinstance(other, Window)
        low, high = meet(self.band(), other.band())
        return Window(
            None if low is None else self.offset - low,
            None if high is None else high - self.offset,
            queries=self.queries,
            keys=self.keys,
            offset=self.offset,
            device=self.device,
        )


def meet(one: Band, other: Band) -> Band:
    """What both bands let through."""
    lows = [low for low, _ in (one, other) if low is not None]
    highs = [high for _, high in (one, other) if high is not None]
    return max(lows, default=None), min(highs, default=None)


def hide_outside(tile: Tensor, low: int | None, high: int | None) -> Tensor:
    """Minus infinity in place where not ``low <= j - i <= high``; only the edges are touched."""
    rows, cols = tile.shape[-2:]
    if high is not None and high < cols - 1:
        first = max(high + 1, 0)
        late = torch.ones(rows, cols - first, dtype=torch.bool, device=tile.device)
        tile[..., first:].masked_fill_(late.triu_(high + 1 - first), -torch.inf)
    if low is not None and low > 1 - rows:
        last = min(rows - 1 + low, cols)
        early = torch.ones(rows, max(last, 0), dtype=torch.bool, device=tile.device)
        tile[..., : max(last, 0)].masked_fill_(early.tril_(low - 1), -torch.inf)
    return tile


def Causal(
    queries: int, keys: int, *, offset: int | None = None, device: torch.device | None = None
) -> Window:
    """Visible where ``j <= i + offset``: a `Window` without a future; by default aligned to the
    end.
    """
    return Window(None, 0, queries=queries, keys=keys, offset=offset, device=device)


class Segments(Mask):
    """Visible where query and key carry the same id: packed sequences. Memory O(queries + keys).

    Args:
        query_ids: integers ``(queries)`` or ``(batch | 1, queries)``.
        key_ids: integers ``(keys)`` or ``(batch | 1, keys)``.
    """

    def __init__(self, query_ids: Tensor, key_ids: Tensor) -> None:
        for name, ids in (("query_ids", query_ids), ("key_ids", key_ids)):
            if ids.ndim not in (1, 2) or ids.is_floating_point():
                raise AttnbiasError(
                    f"Segments {name} takes integers of shape (length) or (batch, length), got "
                    f"{ids.dtype} of shape {tuple(ids.shape)}."
                )
        self.query_ids = query_ids[None] if query_ids.ndim == 1 else query_ids
        self.key_ids = key_ids[None] if key_ids.ndim == 1 else key_ids
        self.queries, self.keys = self.query_ids.shape[-1], self.key_ids.shape[-1]

    @property
    def batch(self) -> int:
        return max(self.query_ids.shape[0], self.key_ids.shape[0])

    def dense(self) -> Tensor:
        return to_mask(self.query_ids[:, None, :, None] == self.key_ids[:, None, None, :])

    def span(self, rows: slice) -> tuple[int, int]:
        ids = self.query_ids[:, rows]
        if ids.numel() == 0:
            return (0, 0)
        low, high = ids.amin(-1, keepdim=True), ids.amax(-1, keepdim=True)
        seen = ((self.key_ids >= low) & (self.key_ids <= high)).any(0).nonzero()
        if len(seen) == 0:
            return (0, 0)
        return (int(seen[0]), int(seen[-1]) + 1)

    def transpose(self) -> Bias:
        return Segments(self.key_ids, self.query_ids)

    def _select(self, batch: slice, heads: slice, rows: slice, cols: slice) -> Bias:
        query_ids, key_ids = narrow(self.query_ids, 0, batch), narrow(self.key_ids, 0, batch)
        return Segments(query_ids[:, rows], key_ids[:, cols])


class Padding(Mask):
    """Visible where ``keep[batch, j]`` is True, for every query and head. Memory O(batch x
    keys).
    """

    def __init__(self, keep: Tensor) -> None:
        if keep.ndim not in (1, 2) or keep.dtype != torch.bool:
            raise AttnbiasError(
                "Padding(keep) takes booleans of shape (keys) or (batch, keys), True is a real "
                f"key, got {keep.dtype} of shape {tuple(keep.shape)}."
            )
        self.keep = keep[None] if keep.ndim == 1 else keep
        self.queries, self.keys = None, self.keep.shape[-1]

    @property
    def batch(self) -> int:
        return self.keep.shape[0]

    def dense(self) -> Tensor:
        return to_mask(self.keep)[:, None, None, :]

    def span(self, rows: slice) -> tuple[int, int]:
        seen = self.keep.any(0).nonzero()
        return (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 0)

    def transpose(self) -> Bias:
        return Dense(self.keep[:, None, :, None])

    def _select(self, batch: slice, heads: slice, rows: slice, cols: slice) -> Bias:
        return Padding(narrow(self.keep, 0, batch)[:, cols])

    def _merge(self, other: Bias) -> Bias | None:
        if (
            isinstance(other, Padding)
            and other.keys == self.keys
            and (other.batch == self.batch or 1 in (other.batch, self.batch))
        ):
            return Padding(self.keep & other.keep)
        return None


MaskRule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class MaskFunction(Mask):
    """Visible where ``function(batch, head, query, key)`` is True; evaluated only for the tiles
    needed.

    Args:
        function: takes four integer tensors that broadcast against each other (absolute indices)
            and returns booleans.
        queries, keys, batch, heads: the sizes; batch and heads are 1 where the rule does not look
            at them.
        query_start, key_start, batch_start, head_start: the absolute index of the first entry.
    """

    def __init__(
        self,
        function: MaskRule,
        *,
        queries: int,
        keys: int,
        batch: int = 1,
        heads: int = 1,
        query_start: int = 0,
        key_start: int = 0,
        batch_start: int = 0,
        head_start: int = 0,
        device: torch.device | None = None,
    ) -> None:
        self.function, self.device = function, device
        self.queries, self.keys = queries, keys
        self._sizes = (batch, heads, queries, keys)
        self._starts = (batch_start, head_start, query_start, key_start)

    @property
    def batch(self) -> int:
        return self._sizes[0]

    @property
    def heads(self) -> int:
        return self._sizes[1]

    def dense(self) -> Tensor:
        index = []
        for dim, (size, start) in enumerate(zip(self._sizes, self._starts, strict=True)):
            shape = [1, 1, 1, 1]
            shape[dim] = size
            index.append(torch.arange(start, start + size, device=self.device).reshape(shape))
        visible = self.function(*index)
        if not isinstance(visible, Tensor) or visible.dtype != torch.bool:
            got = visible.dtype if isinstance(visible, Tensor) else type(visible).__name__
            raise AttnbiasError(f"MaskFunction(function) must return a boolean tensor, got {got}.")
        try:
            return to_mask(visible.broadcast_to(self._sizes))
        except RuntimeError:
            raise AttnbiasError(
                f"MaskFunction(function) must return a shape that broadcasts to {self._sizes}, "
                f"got {tuple(visible.shape)}."
            ) from None

    def _moved(self, function: MaskRule, starts: list[int], sizes: list[int]) -> MaskFunction:
        return MaskFunction(
            function,
            batch=sizes[0],
            heads=sizes[1],
            queries=sizes[2],
            keys=sizes[3],
            batch_start=starts[0],
            head_start=starts[1],
            query_start=starts[2],
            key_start=starts[3],
            device=self.device,
        )

    def transpose(self) -> Bias:
        rule = self.function
        order = (0, 1, 3, 2)
        return self._moved(
            lambda b, h, q, k: rule(b, h, k, q),
            [self._starts[d] for d in order],
            [self._sizes[d] for d in order],
        )

    def _select(self, batch: slice, heads: slice, rows: slice, cols: slice) -> Bias:
        starts, sizes = list(self._starts), list(self._sizes)
        for dim, part in enumerate((batch, heads, rows, cols)):
            if dim < 2 and sizes[dim] == 1:
                continue  # broadcast
            starts[dim] += part.start
            sizes[dim] = length(part)
        return self._moved(self.function, starts, sizes)
