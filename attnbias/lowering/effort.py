"""What each lowering does for a problem, in the counts that its time is made of.

The measured costs (`attnbias.lowering.costs`) are seconds for one of each. A count is named by who
does it and what it is:

- ``operator FORMAT ...``: PyTorch's fused operator, which many lowerings call, and its backward;
  ``stream``, ``own``, ``own backward``: the loops of these; ``tiles``: the backward pass by tiles
  (`attnbias.lowering.backward`), which serves learned biases of all lowerings but `own`. Of each
  ``products`` (features times scores), ``scores`` (of all heads; those that are computed, not those
  that are seen: a tile on the edge of a mask counts whole), ``rows`` and ``keys`` (features of
  queries and keys that are walked), ``blocks`` (of queries), ``dropped`` (scores that may drop);
- ``LOWERING call``, ``LOWERING blocks``, ``LOWERING rows``: what a lowering adds to that, for each
  call however small, each piece it cuts the problem into, each number it copies;
- ``entries KIND``: entries that are made for terms of that kind, times `Bias.entry_cost`, by
  whichever lowering, once each way; ``pull KIND``: the same of their gradients.

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
    Segments,
    Window,
)
from attnbias.lowering import grid, own_parts, packed, tiled
from attnbias.lowering.columns import Folding, rank
from attnbias.lowering.nest import ENTRIES
from attnbias.lowering.problem import Problem
from attnbias.lowering.strided import blocks as strided_blocks
from attnbias.lowering.sums import Sums
from attnbias.lowering.traffic import operator_block, visible

Counts = dict[str, float]
DIRECTIONS = ("forward", "training", "learned")

ROWS = 256  # queries of a tile
STRIP = 64  # queries that the compiled loop takes at a time


def kind(term: Bias) -> str:
    """The name under which the entries of a term are counted."""
    name = type(term).__name__
    return f"{name} {type(term.radial).__name__}" if isinstance(term, Distance) else name


def direction(problem: Problem) -> str:
    """Which passes a call is followed by: none, those to query, key and value, or also those to
    what the bias stores.
    """
    if problem.bias_gradient:
        return "learned"
    return "training" if problem.gradient else "forward"


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
        self.way, self.by_tiles = "forward", False
        self.counts: Counts = {}
        self.format = str(problem.query.dtype).removeprefix("torch.")
        self._seen: dict[int, float] = {}
        ids = [t for t in self.terms if isinstance(t, Segments)]
        self.ranges = None
        if len(ids) == 1 and not (ids[0].query_ids.is_meta or ids[0].key_ids.is_meta):
            self.ranges = packed.ranges(problem)

    def again(self, way: str) -> Effort:
        """Ready to count the next lowering."""
        self.way, self.by_tiles, self.counts = way, False, {}
        return self

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
        if self.ranges is not None:
            packs = packed.pairs(self.ranges) / (p.batch * n * m) + rows / m
            narrow = normal.low is not None and normal.high is not None
            share = min(share, packs) if narrow else share * min(packs, 1.0)
        for term in self.terms:
            if isinstance(term, (Neighborhood, Padding)) and not _meta(term):
                first, last = term.span(slice((n - rows) // 2, (n + rows) // 2 + 1))
                share *= min(1.0, (last - first) / m)
        return min(share, 1.0) * n * m

    def add(self, name: str, **counts: float) -> None:
        """Adds counts of one who does them."""
        for what, number in counts.items():
            key = f"{name} {what}"
            self.counts[key] = self.counts.get(key, 0.0) + number

    def operator(
        self, pairs: float, wide: float, *, masked: bool, rows: int = 0, units: int = 0
    ) -> None:
        """The fused operator on scores of one head, forward and, where a gradient is wanted and
        the lowering uses it, backward.
        """
        p, units = self.problem, units or self.units
        rows = rows or p.queries
        scores = self.units * pairs
        counts = {
            "products": scores * wide,
            "scores": scores,
            "masked": scores * masked,
            "rows": self.units * p.queries * wide,
            "keys": units * p.keys * wide,
            "blocks": float(units * math.ceil(rows / operator_block(rows))),
        }
        self.add(f"operator {self.format}", **counts)
        if self.way != "forward" and not self.by_tiles:
            self.add(f"operator backward {self.format}", **counts)

    def entries(self, terms: list[Bias], number: float) -> None:
        """The entries of some terms, made by `Bias.add_to` or `Bias.block`."""
        for term in terms:
            if not isinstance(term, Window):  # a band is a range of keys
                self.add("entries", **{kind(term): number * term.entry_cost})

    def tiles(self) -> None:
        """The backward pass by tiles."""
        p, pairs = self.problem, self.seen(ROWS)
        blocks = max(math.ceil(p.queries / ROWS), self.units * pairs / ENTRIES)
        self.loop("tiles", pairs, blocks)
        number = (self.units if blocks <= 1 else self.own) * pairs
        self.entries(self.terms, number)
        self.pulled(number)

    def pulled(self, number: float) -> None:
        """The gradients of the entries of the terms that learn."""
        for term in self.terms:
            if self.way == "learned" and term.requires_grad:
                self.add("pull", **{kind(term): number * term.entry_cost})

    def loop(self, name: str, pairs: float, blocks: float, wide: float = 0.0) -> None:
        p, wide = self.problem, wide or float(self.size + self.value)
        scores = self.units * pairs
        rows, keys = self.units * p.queries * wide, p.batch * p.key.shape[1] * p.keys * wide
        half = self.format in ("float16", "bfloat16")
        self.add(
            name,
            call=1.0,
            blocks=blocks,
            rows=rows,
            keys=keys,
            converted=(rows + keys) * half,
            matrices=float(p.batch * p.key.shape[1] * math.ceil(p.queries / ROWS)),
            products=scores * wide,
            scores=scores,
            dropped=scores * (p.dropout > 0.0),
        )

    def read(self, term: Bias) -> bool:
        """Whether the compiled loop reads a term as it is."""
        if isinstance(term, Segments) and self.ranges is None:
            return False  # scattered
        return own_parts.direct(term)

    def columns(self, wide: float) -> None:
        """What making columns costs: factors beside queries and keys, and values as wide."""
        p = self.problem
        made = (self.units * p.queries + 2 * p.batch * p.key.shape[1] * p.keys) * wide
        factors = sum((t.rank or 0) * t.batch * t.heads for t in p.normal.rest)
        factors *= p.queries + p.keys
        self.add(f"columns {self.way}", call=1.0, rows=made, factors=float(factors))

    def folded(self, columns: int) -> float:
        """Features of a score with columns: what `fold.widen` makes of them."""
        size = max(self.size + columns, self.value)
        return 2.0 * (size + (-size % 16 if size % 16 > 8 else 0))


def _meta(term: Bias) -> bool:
    return isinstance(term, Padding) and term.keep.is_meta


def unbiased(problem: Problem) -> Counts:
    """The counts of `sdpa` on the problem without its bias, causal where that is."""
    e = Effort.of(problem).again("training" if direction(problem) != "forward" else "forward")
    low, high = problem.normal.low, problem.normal.high
    pairs = float(problem.queries * problem.keys)
    if low is None and high == problem.keys - problem.queries:
        pairs = min(pairs, (pairs + problem.queries * operator_block(problem.queries)) / 2)
    e.add("sdpa", call=1.0)
    e.operator(pairs, e.wide, masked=False)
    return e.counts


def _sdpa(e: Effort) -> None:
    p = e.problem
    pairs = e.seen(operator_block(p.queries)) if p.normal.band else float(p.queries * p.keys)
    e.add("sdpa", call=1.0)
    e.operator(pairs, e.wide, masked=bool(p.normal.rest) or p.normal.key is not None)


def _strided(e: Effort) -> None:
    p, normal = e.problem, e.problem.normal
    columns = 0
    if normal.rest or normal.key is not None:
        found = p.__dict__.get("sums")
        columns = found.width if isinstance(found, Sums) else rank(normal.rest) or 1
    parts = list(strided_blocks(p.queries, p.keys, normal.low, normal.high))
    pairs = float(sum((b - a) * (d - c) for (a, b), (c, d) in parts))
    wide = e.folded(columns) if columns else e.wide
    e.add("strided", call=1.0, blocks=len(parts), rows=e.units * p.queries * wide)
    if e.way != "forward" and not e.by_tiles:
        e.add("strided backward", blocks=len(parts), rows=e.units * p.queries * wide)
    if columns:
        e.columns(wide)
    e.operator(pairs, wide, masked=True, rows=max((b - a for (a, b), _ in parts), default=1))


def _fold(e: Effort) -> None:
    p, plan = e.problem, e.problem.__dict__.get("folding")
    columns, blocks = rank(p.normal.rest) or 0, 1
    if isinstance(plan, Folding):
        columns, blocks = plan.width, len(plan.blocks)
    learned = [t for t in e.terms if t.requires_grad]
    e.by_tiles = e.way == "learned" and not all(isinstance(t, LowRank) for t in learned)
    pairs = e.seen(operator_block(p.queries)) if p.normal.band else float(p.queries * p.keys)
    wide = e.folded(columns)
    e.add("fold", call=1.0, blocks=blocks)
    e.columns(wide)
    e.operator(pairs, wide, masked=p.normal.key is not None or blocks > 1)


def _tiled(e: Effort) -> None:
    p, bias = e.problem, e.problem.bias
    assert bias is not None
    pairs = e.seen(ROWS)
    tile = max(1.0, min(ROWS, p.queries) * pairs / p.queries)
    together = p.heads
    if bias.heads > 1:
        limit = int(tiled.ENTRIES / tile)
        together = tiled.whole_heads(p.heads, p.heads // p.key.shape[1], limit)
    blocks = float(math.ceil(p.queries / ROWS) * (p.heads // together) * max(bias.batch, 1))
    e.add("tiled", call=1.0, blocks=blocks, rows=e.units * p.queries * e.wide)
    e.entries(e.terms, e.own * pairs)
    if e.way == "training":
        e.add("tiled backward", blocks=blocks)
        e.entries(e.terms, e.own * pairs)
    e.operator(pairs, e.wide, masked=True, rows=ROWS if p.queries > ROWS else 0)


def _stream(e: Effort) -> None:
    pairs = e.seen(ROWS)
    blocks = max(math.ceil(e.problem.queries / ROWS), e.units * pairs / ENTRIES)
    e.loop("stream", pairs, blocks)
    # In a single tile the entries are added to all scores, else built once for what shares them.
    e.entries(e.terms, (e.units if blocks <= 1 else e.own) * pairs)


def _own(e: Effort) -> None:
    _compiled(e, e.terms, e.seen(STRIP))


def _compiled(e: Effort, terms: list[Bias], pairs: float) -> None:
    """The loops of `own` on some terms."""
    plain = [t for t in terms if e.read(t)]
    built = [t for t in terms if not e.read(t)]
    wide = float(e.size + e.value + sum(t.u.shape[-1] for t in plain if isinstance(t, LowRank)))
    number, strips = 0.0, 0.0
    if built:
        batch = max(t.batch for t in built)
        number = batch * max(t.heads for t in built) * pairs
        each = math.ceil(e.problem.queries / (8 * STRIP))
        strips = batch * max(each, number / batch / own_parts.ENTRIES)
    for name in ("own", "own backward")[: 1 if e.way == "forward" else 2]:
        e.loop(name, pairs, strips, wide)
        e.add(name, panels=float(e.units * math.ceil(e.problem.queries / STRIP)))
        e.entries(built, number)
        for term in plain:
            if not isinstance(term, (Window, Segments, LowRank)):
                e.add(f"{name} reads", **{kind(term): e.units * pairs})
        if built:
            e.add(name, strips=e.units * pairs)
    if e.way == "learned":
        for term in plain:
            if term.requires_grad:
                e.add("own sums", **{kind(term): e.units * pairs})
        for term in built:
            if term.requires_grad:
                e.add("pull", **{kind(term): number * term.entry_cost})


def _packed(e: Effort) -> None:
    p = e.problem
    parts = packed.ranges(p) or []
    pairs = packed.pairs(parts) / p.batch
    if p.normal.band:
        pairs = min(pairs, e.seen(STRIP))
    rest = [t for t in e.terms if not isinstance(t, Segments)]
    e.add("packed", call=1.0, parts=float(len(parts)))
    if e.way != "forward":
        e.add("packed backward", parts=float(len(parts)))
    if rest or p.dropout:
        _compiled(e, rest, pairs)
    else:  # each is attention without a bias
        e.operator(pairs, e.wide, masked=False, rows=p.queries * p.batch // max(len(parts), 1))


def _windows(e: Effort) -> None:
    p = e.problem
    pairs = float(p.queries * p.keys)
    shared = [t for t in e.terms if t.batch == 1]
    e.add("windows", call=1.0, rows=e.units * p.queries * e.wide)
    e.entries(shared, max((t.heads for t in shared), default=1) * pairs)
    if len(shared) < len(e.terms):
        e.add("windows", masks=e.units * pairs)
    e.operator(pairs, e.wide, masked=True)


def _grid(e: Effort) -> None:
    p, bias = e.problem, e.problem.bias
    assert isinstance(bias, GridRelative)
    e.by_tiles = e.by_tiles or (e.way != "forward" and bias.specials is not None)
    line = grid._line(bias)
    size = 1 if line is None else bias.rows.size[line]
    lines = e.units * p.queries // max(size, 1)
    e.add("grid", call=1.0 + (bias.specials is not None), rows=e.units * p.queries * e.wide)
    e.operator(float(p.queries * p.keys), e.wide, masked=True, rows=size, units=lines)


COUNTS: dict[str, Callable[[Effort], None]] = {
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
# Whose backward pass is that by tiles, whether the bias learns or not.
BY_TILES = ("stream", "windows")
OWN_BACKWARD = ("own", "packed")


def counts(name: str, problem: Problem) -> Counts:
    """What a lowering of `COUNTS` that offers does for a problem that is not empty."""
    e = Effort.of(problem).again(direction(problem))
    e.by_tiles = e.way == "learned" or name in BY_TILES
    COUNTS[name](e)
    if e.way != "forward":
        e.add(name, **{f"call {e.way}": 1.0})
    if e.way != "forward" and e.by_tiles and name not in OWN_BACKWARD:
        e.tiles()
    return e.counts
