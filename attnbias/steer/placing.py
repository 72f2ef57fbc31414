"""Biases on some heads of a layer, and which rows an edit can reach."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.bias import Bias, Bucketed, Dense, KeyBias, Relative, Sum, add

if TYPE_CHECKING:
    from attnbias.steer.site import SiteCall

CLASSES = 64  # of keys, up to which a table is looked at by class
ROWS = 256  # queries whose visibility is looked at together


class OnHeads(Bias):
    """Head h of the result is head ``index[h]`` of another bias, or all zeros where that is -1.

    The fallback for structures that cannot hold the choice in their own parameters.
    """

    def __init__(self, inner: Bias, index: Sequence[int]) -> None:
        self.inner, self.index = inner, tuple(index)
        self.queries, self.keys, self.offset = inner.queries, inner.keys, inner.offset
        self.may_mask = inner.may_mask
        self.is_mask = inner.is_mask

    @property
    def batch(self) -> int:
        return self.inner.batch

    @property
    def heads(self) -> int:
        return len(self.index)

    def dense(self) -> Tensor:
        part = self.inner.dense()
        index = torch.tensor(self.index, device=part.device, dtype=torch.long)
        source = index.clamp(min=0) if part.shape[1] > 1 else torch.zeros_like(index)
        part = part.index_select(1, source)
        return part.masked_fill((index < 0)[:, None, None], 0.0)

    def span(self, rows: slice) -> tuple[int, int]:
        # A head without the bias sees every key.
        return super().span(rows) if -1 in self.index else self.inner.span(rows)

    def transpose(self) -> Bias:
        return OnHeads(self.inner.transpose(), self.index)

    def parameters(self) -> tuple[Tensor, ...]:
        return self.inner.parameters()

    def _rebuild(self, parameters: Iterator[Tensor]) -> Bias:
        return OnHeads(self.inner._rebuild(parameters), self.index)

    def _select(self, batch: slice, heads: slice, rows: slice, cols: slice) -> Bias:
        part = self.inner._select(batch, slice(0, self.inner.heads), rows, cols)
        return OnHeads(part, self.index[heads])

    def _scaled(self, factor: float | Tensor) -> Bias:
        if isinstance(factor, Tensor):
            return Dense(self.dense())._scaled(factor)
        return OnHeads(self.inner._scaled(factor), self.index)


def take(bias: Bias, heads: Sequence[int], total: int) -> Bias:
    """Some heads of a bias on `total` heads; a bias that broadcasts over heads stays as it is."""
    if bias.heads == 1 or list(heads) == list(range(total)):
        return bias
    return _index(bias, tuple(heads))


def place(bias: Bias, heads: Sequence[int], total: int) -> Bias:
    """A bias on some heads (or one for all of them) as one on `total` heads, 0 elsewhere."""
    if list(heads) == list(range(total)):
        return bias
    index = [-1] * total
    for own, head in enumerate(heads):
        index[head] = own if bias.heads > 1 else 0
    return _index(bias, tuple(index))


def _index(bias: Bias, index: tuple[int, ...]) -> Bias:
    if isinstance(bias, Sum):
        return add(*(_index(term, index) for term in bias.terms()))
    if bias.heads == 1 and -1 not in index:
        return bias
    if isinstance(bias, KeyBias):
        return KeyBias(gather(bias.weight, index))
    if isinstance(bias, Relative):
        table = gather(bias.table, index)
        return Relative(table, queries=bias.queries, keys=bias.keys, offset=bias.offset)
    if isinstance(bias, Bucketed):
        rows = None if bias.rows is None else gather(bias.rows, index, fill=False)
        return Bucketed(gather(bias.table, index), rows, gather(bias.cols, index, fill=False))
    return OnHeads(bias, index)


@functools.lru_cache(maxsize=1024)
def numbers(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers of heads as an index: not to be written into."""
    with torch.inference_mode(False):  # one tensor for calls with and without it
        return torch.tensor(heads, device=device, dtype=torch.long)


def gather(tensor: Tensor, index: tuple[int, ...], fill: bool = True) -> Tensor:
    """Heads (dimension 1) by number; -1 gives zeros (or, for class numbers, any head)."""
    if tensor.shape[1] == 1 and not (fill and -1 in index):
        return tensor
    if index == tuple(range(tensor.shape[1])):
        return tensor
    found = numbers(index, tensor.device)
    source = found.clamp(min=0) if tensor.shape[1] > 1 else torch.zeros_like(found)
    part = tensor.index_select(1, source)
    if not fill or -1 not in index:
        return part
    return part.masked_fill((found < 0).reshape((1, -1) + (1,) * (part.ndim - 2)), 0.0)


def on_last(site: SiteCall, line: Tensor) -> Bias:
    """A bias on the last real query of each row alone: ``line (batch, heads, 1, keys)``."""
    if site.shape[2] == 1:
        return KeyBias(line[:, :, 0])
    order = torch.arange(site.shape[2], device=line.device)
    rows = (order == site.last.to(line.device)[:, None]).long()[:, None]
    cols = torch.arange(line.shape[-1], device=line.device)[None, None]
    return Bucketed(torch.cat([torch.zeros_like(line), line], 2), rows, cols)


def reach(edit: Bias, own: Bias | None, shape: tuple[int, int, int, int]) -> Tensor:
    """The rows that an edit changes: bool ``(batch, heads, queries)``.

    A row is changed where some key that the model lets it see has an entry other than 0.

    Args:
        edit: the edit, on one or all heads.
        own: the model's own masks and position bias.
        shape: ``(batch, heads, queries, keys)``.
    """
    batch, heads, queries, _ = shape
    touched = torch.zeros(1, 1, 1, dtype=torch.bool)
    for term in edit.terms():
        if isinstance(term, KeyBias):
            found = _reach_keys(term.weight != 0, own, shape)
        elif isinstance(term, Bucketed) and term.table.shape[-1] <= CLASSES:
            found = _reach_classes(term, own, shape)
        else:
            found = _reach_any(term, own, shape, _candidates(term, shape[2]))
        touched = touched.to(found.device) | found
    return touched.expand(batch, heads, queries)


def _reach_keys(moved: Tensor, own: Bias | None, shape: tuple[int, int, int, int]) -> Tensor:
    """For an edit per key. moved: bool ``(batch | 1, heads | 1, keys)``."""
    places = moved.flatten(0, 1).any(0).nonzero()
    if not len(places):
        return moved.new_zeros(1, 1, 1)
    masks = _masks(own)
    if masks is None:
        return moved.any(-1, keepdim=True)
    cols = slice(int(places[0]), int(places[-1]) + 1)
    chosen = moved[..., cols].float()[..., None]  # (b, h, keys, 1)
    parts = []
    for start in range(0, shape[2], ROWS):
        rows = slice(start, min(start + ROWS, shape[2]))
        seen = _seen(masks, rows, cols).to(moved.device)
        # The count of chosen keys that a row sees, for all heads in one product.
        seen = seen.expand(*seen.shape[:2], rows.stop - rows.start, cols.stop - cols.start)
        parts.append((seen.float() @ chosen)[..., 0] > 0)
    return torch.cat(parts, -1)


def _candidates(edit: Bias, queries: int) -> range:
    """The queries that an edit could change: fewer than all where a table of classes says so."""
    if not isinstance(edit, Bucketed) or edit.rows is None:
        return range(queries)
    lines = (edit.table != 0).any(-1)  # (b, h, classes)
    size = [max(a, b) for a, b in zip(lines.shape[:2], edit.rows.shape[:2], strict=True)]
    rows = edit.rows.long().expand(*size, -1)
    moved = lines.expand(*size, -1).gather(2, rows).flatten(0, 1).any(0).nonzero()
    return range(int(moved[0]), int(moved[-1]) + 1) if len(moved) else range(0)


def _reach_classes(edit: Bucketed, own: Bias | None, shape: tuple[int, int, int, int]) -> Tensor:
    """For a table of few classes of keys: which classes each query sees, one product for all."""
    lines = edit.table != 0  # (b, h, classes of queries, classes)
    if edit.rows is not None:
        size = [max(a, b) for a, b in zip(lines.shape[:2], edit.rows.shape[:2], strict=True)]
        index = edit.rows.long()[..., None].expand(*size, -1, lines.shape[-1])
        lines = lines.expand(*size, -1, -1).gather(2, index)
    places = lines.any(-1).flatten(0, 1).any(0).nonzero()
    if not len(places):
        return lines.new_zeros(1, 1, 1)
    first, last = int(places[0]), int(places[-1]) + 1
    kinds = torch.nn.functional.one_hot(edit.cols.long(), lines.shape[-1]).float()
    masks = _masks(own)
    parts = []
    for start in range(first, last, ROWS):
        rows = slice(start, min(start + ROWS, last))
        if masks is None:
            seen = kinds.sum(2, keepdim=True) > 0
        else:
            block = _seen(masks, rows, slice(0, shape[3])).to(kinds.device)
            block = block.expand(*block.shape[:2], rows.stop - rows.start, shape[3])
            seen = block.float() @ kinds > 0
        parts.append((lines[:, :, rows] & seen).any(-1))
    return torch.nn.functional.pad(torch.cat(parts, -1), (first, shape[2] - last))


def _reach_any(
    edit: Bias, own: Bias | None, shape: tuple[int, int, int, int], queries: range
) -> Tensor:
    """For any other structure: entries are built for one head and `ROWS` queries at a time."""
    if not len(queries):
        return torch.zeros(1, 1, 1, dtype=torch.bool)
    masks, whole = _masks(own), slice(0, shape[3])
    pad = (queries.start, shape[2] - queries.stop)
    found = []
    for head in range(edit.heads):
        parts = []
        for start in range(queries.start, queries.stop, ROWS):
            rows = slice(start, min(start + ROWS, queries.stop))
            part = slice(head, head + 1)
            moved = edit[slice(None), part, rows, whole].dense() != 0
            if masks is not None:
                own_part = part if masks.heads > 1 else slice(0, 1)
                moved = moved & _seen(masks[:, own_part, :, :], rows, whole).to(moved.device)
            row = moved.any(-1).any(1, keepdim=True)
            parts.append(row.expand(row.shape[0], 1, rows.stop - rows.start))
        found.append(torch.nn.functional.pad(torch.cat(parts, -1), pad))
    return torch.cat(found, 1)


def _seen(masks: Bias, rows: slice, cols: slice) -> Tensor:
    return masks.block(rows, cols) > -torch.inf


def _masks(own: Bias | None) -> Bias | None:
    """The terms of the model's bias that can hide a key."""
    terms = [] if own is None else [term for term in own.terms() if term.may_mask]
    return add(*terms) if terms else None
