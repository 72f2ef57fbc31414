"""What each lowering does for a problem, in the counts that its time is made of.

The measured costs (`attnbias.lowering.costs`) are seconds for one of each:

- ``call``: one, what a call costs however small it is; ``blocks``: the pieces it is cut into, calls
  of an operator, tiles or strips;
- ``rows``, ``keys``: features of queries and of keys that are read, copied or written;
- ``products``: features times scores, ``scores``: scores of all heads, those that are computed, not
  those that are seen: a tile on the edge of a mask counts whole; ``dropped``: scores that may drop;
- ``entries KIND``: entries that are made or read for terms of that kind, times `Bias.entry_cost`.

Counted from shapes and structure, and from what the offers of a problem found out already (columns
of a fold, ranges of packed segments). What is not known there (a mask with holes) counts as seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from attnbias.bias import (
    Bias,
    Distance,
    GridRelative,
    LowRank,
    Neighborhood,
    Padding,
    Relative,
    Segments,
    Window,
)
from attnbias.lowering import own_parts, packed, tiled
from attnbias.lowering.columns import Folding, rank
from attnbias.lowering.nest import ENTRIES
from attnbias.lowering.problem import Problem
from attnbias.lowering.strided import blocks as strided_blocks
from attnbias.lowering.sums import Sums
from attnbias.lowering.traffic import operator_block, visible

Counts = dict[str, float]

ROWS = 256  # queries of a tile
STRIP = 64  # queries that the compiled loop takes at a time


def kind(term: Bias) -> str:
    """The name under which the entries of a term are counted."""
    name = type(term).__name__
    return f"{name} {type(term.radial).__name__}" if isinstance(term, Distance) else name


class Effort:
    """The counts of one problem, made once for it by `of`."""

    def __init__(self, problem: Problem) -> None:
        p = self.problem = problem
        self.units = p.batch * p.heads
        self.size, self.value = p.query.shape[-1], p.value.shape[-1]
        # Where the operator takes one size for all.
        self.wide = 2 * max(self.size, self.value)
        self.terms = [] if p.bias is None else p.bias.terms()
        self.own = 1 if p.bias is None else p.bias.batch * p.bias.heads
        self._seen: dict[int, float] = {}

    @staticmethod
    def of(problem: Problem) -> Effort:
        found = problem.__dict__.get("effort")
        if not isinstance(found, Effort):
            found = problem.__dict__["effort"] = Effort(problem)
        return found

    def seen(self, rows: int) -> float:
        """Scores of one head that are computed where blocks of so many queries skip what none of
        them sees.
        """
        if rows not in self._seen:
            self._seen[rows] = self._count(rows)
        return self._seen[rows]

    def _count(self, rows: int) -> float:
        p, n, m = self.problem, self.problem.queries, self.problem.keys
        normal = p.normal
        rows = min(rows, n)
        share = 1.0
        if normal.band:
            edges = (normal.low is not None) + (normal.high is not None)
            share = visible(n, m, normal.low, normal.high) / (n * m) + edges * rows / (2 * m)
        ids = [t for t in self.terms if isinstance(t, Segments)]
        if len(ids) == 1 and not (ids[0].query_ids.is_meta or ids[0].key_ids.is_meta):
            parts = packed.ranges(p)
            if parts is not None:
                packs = packed.pairs(parts) / (p.batch * n * m) + rows / m
                narrow = normal.low is not None and normal.high is not None
                share = min(share, packs) if narrow else share * min(packs, 1.0)
        for term in self.terms:
            if isinstance(term, (Neighborhood, Padding)) and not _meta(term):
                first, last = term.span(slice((n - rows) // 2, (n + rows) // 2 + 1))
                share *= min(1.0, (last - first) / m)
        return min(share, 1.0) * n * m

    def core(
        self, pairs: float, *, wide: float | None = None, blocks: float = 1.0, units: int = 0
    ) -> Counts:
        p, units = self.problem, units or self.units
        width = float(self.size + self.value) if wide is None else wide
        found = {
            "call": 1.0,
            "blocks": blocks,
            "rows": self.units * p.queries * width,
            "keys": units * p.keys * width,
            "products": self.units * pairs * width,
            "scores": self.units * pairs,
        }
        if p.dropout:
            found["dropped"] = self.units * pairs
        return found

    def entries(self, counts: Counts, terms: list[Bias], number: float) -> Counts:
        """Adds the entries of some terms."""
        for term in terms:
            if isinstance(term, Window):
                continue  # a band is a range of keys
            name = f"entries {kind(term)}"
            counts[name] = counts.get(name, 0.0) + number * term.entry_cost
        return counts

    def folded(self, columns: int) -> float:
        """Features of a score with columns: what `fold.widen` makes of them."""
        size = max(self.size + columns, self.value)
        return 2.0 * (size + (-size % 16 if size % 16 > 8 else 0))


def _meta(term: Bias) -> bool:
    return isinstance(term, Padding) and term.keep.is_meta


def unbiased(problem: Problem) -> Counts:
    """The counts of `sdpa` on the problem without its bias, causal where that is."""
    e = Effort.of(problem)
    low, high = problem.normal.low, problem.normal.high
    causal = low is None and high == problem.keys - problem.queries
    block = operator_block(problem.queries)
    pairs = float(problem.queries * problem.keys)
    if causal:
        pairs = min(pairs, pairs / 2 + problem.queries * block / 2)
    blocks = e.units * math.ceil(problem.queries / block)
    return e.core(pairs, wide=e.wide, blocks=blocks)


def _sdpa(e: Effort) -> Counts:
    p = e.problem
    block = operator_block(p.queries)
    pairs = e.seen(block) if p.normal.band else float(p.queries * p.keys)
    counts = e.core(pairs, wide=e.wide, blocks=e.units * math.ceil(p.queries / block))
    return e.entries(counts, e.terms, e.units * pairs)


def _strided(e: Effort) -> Counts:
    p, normal = e.problem, e.problem.normal
    columns = 0
    if normal.rest or normal.key is not None:
        found = p.__dict__.get("sums")
        columns = found.width if isinstance(found, Sums) else rank(normal.rest) or 1
    parts = list(strided_blocks(p.queries, p.keys, normal.low, normal.high))
    pairs = float(sum((b - a) * (d - c) for (a, b), (c, d) in parts))
    wide = e.folded(columns) if columns else e.wide
    counts = e.core(pairs, wide=wide, blocks=len(parts))
    if columns:
        counts["folded"] = e.units * (p.queries + 2 * p.keys) * wide
    return e.entries(counts, [t for t in e.terms if isinstance(t, Relative)], e.units * pairs)


def _fold(e: Effort) -> Counts:
    p, plan = e.problem, e.problem.__dict__.get("folding")
    columns, blocks = rank(p.normal.rest) or 0, 1
    if isinstance(plan, Folding):
        columns, blocks = plan.width, len(plan.blocks)
    pairs = e.seen(operator_block(p.queries)) if p.normal.band else float(p.queries * p.keys)
    wide = e.folded(columns)
    counts = e.core(pairs, wide=wide, blocks=blocks)
    counts["folded"] = e.units * (p.queries + 2 * p.keys) * wide
    counts["masked"] = float(e.units * pairs) if p.normal.key is not None or blocks > 1 else 0.0
    return counts


def _tiled(e: Effort) -> Counts:
    p, bias = e.problem, e.problem.bias
    assert bias is not None
    pairs = e.seen(ROWS)
    tile = max(1.0, min(ROWS, p.queries) * pairs / p.queries)
    together = p.heads
    if bias.heads > 1:
        limit = int(tiled.ENTRIES / tile)
        together = tiled.whole_heads(p.heads, p.heads // p.key.shape[1], limit)
    blocks = math.ceil(p.queries / ROWS) * (p.heads // together) * max(bias.batch, 1)
    counts = e.core(pairs, wide=e.wide, blocks=blocks)
    return e.entries(counts, e.terms, e.own * pairs)


def _stream(e: Effort) -> Counts:
    p = e.problem
    pairs = e.seen(ROWS)
    blocks = max(math.ceil(p.queries / ROWS), e.units * pairs / ENTRIES)
    counts = e.core(pairs, blocks=blocks)
    # In a single tile the entries are added to all scores, else built once for what shares them.
    shared = e.units if blocks <= 1 else e.own
    return e.entries(counts, e.terms, shared * pairs)


def _own(e: Effort) -> Counts:
    pairs = e.seen(STRIP)
    plain = [t for t in e.terms if own_parts.direct(t)]
    built = [t for t in e.terms if not own_parts.direct(t)]
    columns = sum(t.u.shape[-1] for t in plain if isinstance(t, LowRank))
    wide = float(e.size + e.value + columns)
    strips = 0.0
    if built:
        number = e.own * pairs
        strips = max(math.ceil(e.problem.queries / (8 * STRIP)), number / own_parts.ENTRIES)
    counts = e.core(pairs, wide=wide, blocks=strips)
    e.entries(counts, [t for t in plain if not isinstance(t, LowRank)], e.units * pairs)
    counts = e.entries(counts, built, e.own * pairs)
    if built:
        counts["strips"] = e.units * pairs
    return counts


def _packed(e: Effort) -> Counts:
    p = e.problem
    parts = packed.ranges(p) or []
    pairs = packed.pairs(parts) / p.batch
    if p.normal.band:
        pairs = min(pairs, e.seen(STRIP))
    counts = e.core(pairs, blocks=len(parts))
    rest = [t for t in e.terms if not isinstance(t, Segments)]
    return e.entries(counts, rest, e.units * pairs)


def _windows(e: Effort) -> Counts:
    p = e.problem
    pairs = float(p.queries * p.keys)
    blocks = e.units * math.ceil(p.queries / operator_block(p.queries))
    counts = e.core(pairs, wide=e.wide, blocks=blocks)
    shared = [t for t in e.terms if t.batch == 1]
    e.entries(counts, shared, max((t.heads for t in shared), default=1) * pairs)
    return e.entries(counts, [t for t in e.terms if t.batch > 1], e.units * pairs)


def _grid(e: Effort) -> Counts:
    from attnbias.lowering.grid import _line

    p, bias = e.problem, e.problem.bias
    assert isinstance(bias, GridRelative)
    line = _line(bias)
    size = 1 if line is None else bias.rows.size[line]
    lines = e.units * p.queries // max(size, 1)
    blocks = lines * math.ceil(size / operator_block(size))
    counts = e.core(float(p.queries * p.keys), wide=e.wide, blocks=blocks, units=lines)
    if bias.specials is not None:
        counts["specials"] = 1.0
    return counts


COUNTS: dict[str, Callable[[Effort], Counts]] = {
    "sdpa": _sdpa,
    "strided": _strided,
    "windows": _windows,
    "packed": _packed,
    "grid": _grid,
    "fold": _fold,
    "tiled": _tiled,
    "stream": _stream,
    "own": _own,
}


def counts(name: str, problem: Problem) -> Counts | None:
    """What a lowering that offers does for a problem; None where nobody counts it."""
    if name not in COUNTS or problem.empty:
        return None
    return COUNTS[name](Effort.of(problem))
