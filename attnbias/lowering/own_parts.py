"""What of a bias the compiled attention reads as it is, and what is built for it in strips."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnbias.bias import Bias, Dense, KeyBias, LowRank, Padding, Relative, Segments, Sum, Window
from attnbias.bias.base import to_mask
from attnbias.lowering import packed

ENTRIES = 2**21  # of a strip, about: 8 MB
BLOCK = 64  # queries of a strip at least, where there are as many


def direct(term: Bias) -> bool:
    """Whether a term needs no entries, judged by kind and shape alone."""
    if isinstance(term, Dense):
        return term.keys is not None and term.queries is not None
    return isinstance(term, (Window, KeyBias, Padding, Relative, LowRank, Segments))


@dataclass
class Parts:
    """A bias, sorted. Terms are named by their place in `Bias.terms`.

    table ``(batch | 1, heads | 1, queries + keys - 1)``, row ``(batch | 1, heads | 1, keys)``,
    left and right, the columns of queries and keys ``(batch | 1, heads | 1, length, rank)``, dense
    ``(batch | 1, heads | 1, queries, keys)``: float32, or None. low, high ``(batch | 1, queries)``:
    the range of keys that a query sees.
    """

    low: Tensor
    high: Tensor
    table: Tensor | None = None
    row: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    tables: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)  # the term that `dense` is
    strips: list[int] = field(default_factory=list)

    @staticmethod
    def of(bias: Bias | None, batch: int, queries: int, keys: int) -> Parts:
        """Of a bias without gradients."""
        terms = [] if bias is None else bias.terms()
        place = torch.arange(queries)[None]
        parts = Parts(torch.zeros_like(place), torch.full_like(place, keys))
        built = any(not direct(t) for t in terms)
        for at, term in enumerate(terms):
            if isinstance(term, Window):
                low, high = term.band()
                if low is not None:
                    parts.low = torch.maximum(parts.low, place + low)
                if high is not None:
                    parts.high = torch.minimum(parts.high, place + high + 1)
            elif isinstance(term, Padding) and (edges := _edges(term.keep)) is not None:
                parts.low = torch.maximum(parts.low, edges[0])
                parts.high = torch.minimum(parts.high, edges[1])
            elif isinstance(term, Padding):
                parts._row(to_mask(term.keep)[:, None])
            elif isinstance(term, KeyBias):
                parts.rows.append(at)
                parts._row(term.weight)
            elif isinstance(term, Relative):
                parts.tables.append(at)
                table = _real(term.table)
                parts.table = table if parts.table is None else parts.table + table
            elif isinstance(term, LowRank):
                parts.columns.append(at)
                parts.left = _beside(parts.left, _real(term.u))
                parts.right = _beside(parts.right, _real(term.v))
            elif isinstance(term, Segments) and (found := _ranges(term, batch, queries)):
                parts.low = torch.maximum(parts.low, found[0])
                parts.high = torch.minimum(parts.high, found[1])
            elif isinstance(term, Dense) and direct(term) and not built and not parts.whole:
                parts.whole.append(at)
                dense = _real(term.tensor)
                parts.dense = dense if dense.stride(-1) == 1 else dense.contiguous()
            else:
                parts.strips.append(at)
        parts.low = parts.low.clamp(0, keys).contiguous()
        parts.high = torch.maximum(parts.high.clamp(0, keys), parts.low).contiguous()
        if parts.low.shape != parts.high.shape:
            rows = max(len(parts.low), len(parts.high))
            parts.low, parts.high = (
                t.expand(rows, -1).contiguous() for t in (parts.low, parts.high)
            )
        return parts

    def _row(self, row: Tensor) -> None:
        row = _real(row)
        self.row = row if self.row is None else self.row + row

    def built(self, bias: Bias) -> Bias | None:
        """The terms of `bias` whose entries are built."""
        terms = bias.terms()
        found = [terms[at] for at in self.strips]
        return None if not found else found[0] if len(found) == 1 else Sum(found)


def _real(tensor: Tensor) -> Tensor:
    """In float32, with rows that lie in one piece: a T5 table is a transposed one."""
    made = tensor.detach().to("cpu", torch.float32)
    return made if made.stride(-1) == 1 else made.contiguous()


def _beside(one: Tensor | None, two: Tensor) -> Tensor:
    """Columns side by side, with the batch and heads of both."""
    if one is None:
        return two
    size = [max(a, b) for a, b in zip(one.shape[:2], two.shape[:2], strict=True)]
    return torch.cat([t.expand(*size, *t.shape[2:]) for t in (one, two)], -1)


def _edges(keep: Tensor) -> tuple[Tensor, Tensor] | None:
    """``(first, last + 1)`` of the real keys ``(batch, 1)``; None where a row has gaps."""
    keep = keep.cpu()
    if keep.shape[-1] == 0:
        return None
    count = keep.sum(-1, keepdim=True)
    first = keep.to(torch.uint8).argmax(-1, keepdim=True)
    last = keep.shape[-1] - keep.flip(-1).to(torch.uint8).argmax(-1, keepdim=True)
    last = torch.where(count > 0, last, first)
    return (first, last) if bool((last - first == count).all()) else None


def _ranges(term: Segments, batch: int, queries: int) -> tuple[Tensor, Tensor] | None:
    """The range of keys of each query; None where the keys of a segment are scattered."""
    parts = packed.found_ranges(term, batch)
    if parts is None:
        return None
    low = torch.zeros(term.batch, queries, dtype=torch.int64)
    high = torch.zeros_like(low)
    for own, rows, cols in parts:
        at = own if term.batch > 1 else slice(0, 1)
        low[at, rows], high[at, rows] = cols.start, cols.stop
    return low, high


def strips(
    bias: Bias, parts: Parts, sizes: tuple[int, int, int, int], share: int
) -> list[tuple[slice, slice, slice, slice]]:
    """The strips that see a key: slices of batch, heads, rows and keys, the keys from a panel on.

    What a bias broadcasts lies in one strip with all batch elements and heads.
    """
    batch, heads, queries, keys = sizes
    found = []
    few = batch if bias.batch == 1 else 1
    for b in range(0, batch, few):
        own = slice(b, b + few)
        seen = bias if bias.batch == 1 else bias[own, :, :, :]
        edge = slice(None) if parts.low.shape[0] == 1 else own
        start = 0
        while start < queries:
            # As many rows as fit, with all heads if they are at least a block.
            rows = min(queries, start + 8 * BLOCK)
            row = slice(start, rows)
            first, last = _span(seen, parts, edge, row, keys)
            many = 1 if bias.heads == 1 else heads
            while rows - start > BLOCK and (rows - start) * (last - first) * many > ENTRIES:
                rows = start + max(BLOCK, (rows - start) // 2 // BLOCK * BLOCK)
                row = slice(start, rows)
                first, last = _span(seen, parts, edge, row, keys)
            start = rows
            if last <= first:
                continue
            while many > share and (row.stop - row.start) * (last - first) * many > ENTRIES:
                fits = [n for n in range(share, many, share) if heads % n == 0]
                if not fits:
                    break
                many = fits[-1]
            together = heads if bias.heads == 1 else many
            for h in range(0, heads, together):
                found.append((own, slice(h, h + together), row, slice(first, last)))
    return found


def _span(bias: Bias, parts: Parts, edge: slice, row: slice, keys: int) -> tuple[int, int]:
    low, high = parts.low[edge, row], parts.high[edge, row]
    some = high > low
    if not bool(some.any()):
        return 0, 0
    first, last = int(low[some].min()), int(high[some].max())
    if bias.keys is not None:
        one, two = bias.span(row)
        first, last = max(first, one), min(last, two)
    return first, min(last, keys)
