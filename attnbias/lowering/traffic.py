"""What each lowering moves and computes for a problem: passes, bytes, operations.

Counted by name from shapes alone, so that a lowering need not say it. The model, the same for all:

- an operator reads each array that it is handed once, keys and values once for each block of
  queries that walks them, and writes its results once;
- scores that stay inside an operator are not moved; tiles that a lowering makes between operators
  are, as often as they are written and read;
- a score costs two operations for each feature of keys and values, and four (bias, largest score,
  exponential, sum). What a structure spends on making its entries is not in it.

Caches are not modelled: the numbers compare lowerings, they do not predict a time. `passes` is how
often the scores of a row are gone through: see `attnbias.lowering.passes`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from attnbias.lowering import own_parts, packed
from attnbias.lowering.problem import Offer, Problem

ROWS = 256  # queries of a tile
POINTWISE = 4  # operations on a score besides the products


@dataclasses.dataclass
class _Sizes:
    """Sizes of a problem in elements and bytes; `pairs` are the visible scores of one head."""

    problem: Problem

    def __post_init__(self) -> None:
        p = self.problem
        self.wide = p.query.element_size()
        self.real = 8 if self.wide == 8 else 4  # of masks, tables, scores
        self.units = p.batch * p.heads
        self.size, self.value = p.query.shape[-1], p.value.shape[-1]
        self.pairs = visible(p.queries, p.keys, p.normal.low, p.normal.high)

    def fused(self, block: int, more: int = 0) -> tuple[int, int]:
        """Bytes read and written by a fused operator on blocks of queries, `more` columns wider."""
        p, width = self.problem, self.size + more
        query = self.units * p.queries * width * self.wide
        walked = math.ceil(self.pairs / max(min(block, p.queries), 1))
        keys = self.units * walked * (width + self.value + more) * self.wide
        out = self.units * p.queries * (self.value + more) * self.wide
        return query + keys, out + self.units * p.queries * self.real

    def operations(self, pairs: int | None = None, more: int = 0) -> int:
        count = self.pairs if pairs is None else pairs
        return self.units * count * (2 * (self.size + self.value + 2 * more) + POINTWISE)


def visible(queries: int, keys: int, low: int | None, high: int | None) -> int:
    """How many of ``queries x keys`` entries lie in the band ``low <= j - i <= high``."""
    first = 1 - queries if low is None else max(low, 1 - queries)
    last = keys - 1 if high is None else min(high, keys - 1)
    if queries == 0 or keys == 0 or last < first:
        return 0
    return _below(queries, keys, last) - _below(queries, keys, first - 1)


def _below(queries: int, keys: int, diagonal: int) -> int:
    """Entries with ``j - i <= diagonal``, for a diagonal inside the matrix or just before it."""
    # Row i has min(keys, i + diagonal + 1) of them, where that is positive.
    start = max(0, -diagonal)
    full = min(max(keys - diagonal - 1, start), queries)
    rising = full - start
    total = rising * (diagonal + 1) + (start + full - 1) * rising // 2 if rising > 0 else 0
    return total + (queries - full) * keys


def operator_block(queries: int) -> int:
    """Queries that PyTorch's fused CPU operator takes at a time."""
    return 256 if queries >= 768 else 64 if queries >= 192 else 32


def _sdpa(s: _Sizes) -> tuple[int, int, int, int]:
    p, normal = s.problem, s.problem.normal
    block = operator_block(p.queries)
    read, written = s.fused(block)
    if normal.rest:
        read += s.units * s.pairs * s.real
    elif normal.key is not None:
        read += s.units * p.keys * s.real * math.ceil(p.queries / block)
    return 1, read, written, s.operations()


def _strided(s: _Sizes) -> tuple[int, int, int, int]:
    p = s.problem
    block = operator_block(p.queries)
    read, written = s.fused(block)
    # Queries go in reversed and outputs come out so; the mask is a strip for each block.
    turned = s.units * p.queries * (s.size + s.value) * s.wide
    strip = s.units * (p.queries + math.ceil(p.queries / block) * p.keys) * s.real
    return 1, read + turned + strip, written + turned, s.operations()


def _tiled(s: _Sizes) -> tuple[int, int, int, int]:
    bias = s.problem.bias
    own = s.units if bias is None else bias.batch * bias.heads
    read, written = s.fused(operator_block(min(s.problem.queries, ROWS)))
    entries = s.pairs * s.real
    return 1, read + s.units * entries, written + own * entries, s.operations()


def _stream(s: _Sizes) -> tuple[int, int, int, int]:
    # Scores are written by one product, read and written by the loop, read by the other product.
    read, written = s.fused(ROWS)
    entries = s.units * s.pairs * s.real
    return 1, read + 2 * entries, written + 2 * entries, s.operations()


def _fold(s: _Sizes) -> tuple[int, int, int, int]:
    p = s.problem
    ranks = [term.rank for term in p.normal.rest]
    columns = sum(rank for rank in ranks if rank is not None)
    read, written = s.fused(operator_block(p.queries), columns)
    # Queries, keys and values are copied next to their columns.
    rows = p.batch * (p.heads * p.queries + 2 * p.key.shape[1] * p.keys)
    plain, copied = rows * s.size * s.wide, rows * (s.size + columns) * s.wide
    return 1, read + plain, written + copied, s.operations(more=columns)


def _own(s: _Sizes) -> tuple[int, int, int, int]:
    p = s.problem
    read, written = s.fused(64)
    # Keys are copied to panels; entries that are built are written and read once more.
    copied = p.batch * p.key.shape[1] * p.keys * s.size * 4
    terms = [] if p.bias is None else p.bias.terms()
    built = [t for t in terms if not own_parts.direct(t)]
    entries = s.pairs * s.real if built else 0
    own = p.bias.batch * p.bias.heads if p.bias is not None else 0
    return 1, read + copied + s.units * entries, written + copied + own * entries, s.operations()


def _reference(s: _Sizes) -> tuple[int, int, int, int]:
    # In float64: scores, their sum with the bias, where a row is empty, log-sum-exp (two passes),
    # softmax (three), the product with the values: ten reads and five writes of every score.
    full = s.problem.queries * s.problem.keys
    moved = 8 * s.units * full
    read, written = s.fused(max(s.problem.queries, 1))
    return 3, read + 10 * moved, written + 5 * moved, s.operations(full)


def _packed(s: _Sizes) -> tuple[int, int, int, int]:
    s.pairs = packed.pairs(packed.ranges(s.problem) or []) // s.problem.batch
    read, written = s.fused(operator_block(s.problem.queries))
    return 1, read, written, s.operations()


COUNTS: dict[str, Callable[[_Sizes], tuple[int, int, int, int]]] = {
    "sdpa": _sdpa,
    "windows": _sdpa,
    "packed": _packed,
    "strided": _strided,
    "grid": _strided,
    "fold": _fold,
    "tiled": _tiled,
    "stream": _stream,
    "own": _own,
    "reference": _reference,
}


def counted(offer: Offer, problem: Problem) -> Offer:
    """The offer with its passes, bytes and operations; a refusal, and a lowering that is not known
    here, stay as they are.
    """
    if offer.refused or offer.lowering not in COUNTS or problem.empty:
        return offer
    passes, read, written, operations = COUNTS[offer.lowering](_Sizes(problem))
    return dataclasses.replace(
        offer, passes=passes, read=read, written=written, operations=operations
    )
