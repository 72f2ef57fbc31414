"""What every lowering does for a problem: see `attnbias.lowering.effort`."""

from __future__ import annotations

import math
from collections.abc import Callable

from attnbias.bias import Bias, GridRelative, LowRank, Segments, Window
from attnbias.lowering import grid, own_parts, packed, tiled
from attnbias.lowering.columns import Folding, rank
from attnbias.lowering.effort import ROWS, STRIP, Counts, Effort, direction, far, idle, kind
from attnbias.lowering.nest import ENTRIES
from attnbias.lowering.problem import Problem
from attnbias.lowering.strided import blocks as strided_blocks
from attnbias.lowering.sums import Sums
from attnbias.lowering.traffic import operator_block

KERNEL = 128  # queries of a program of a GPU kernel, about


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
        _summed(e, "strided backward", sum(d - c for _, (c, d) in parts), wide)
    if columns:
        e.columns(wide)
    e.operator(pairs, wide, masked=True, rows=max((b - a for (a, b), _ in parts), default=1))


def _summed(e: Effort, name: str, keys: float, wide: float) -> None:
    """Gradients to keys and values that are summed over blocks of queries; `keys` of all blocks."""
    heads = e.problem.batch * e.problem.key.shape[1]
    e.add(name, keys=heads * keys * wide, far=far(heads * e.problem.keys * wide))


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
        _summed(e, "tiled backward", math.ceil(p.queries / ROWS) * pairs / p.queries, e.wide)
        e.entries(e.terms, e.own * pairs)
    few = together * (p.batch if bias.batch == 1 else 1)
    e.operator(pairs, e.wide, masked=True, rows=min(ROWS, p.queries), together=few)


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
        panels = e.units * math.ceil(e.problem.queries / STRIP)
        e.loop(name, pairs, strips, wide, idle(math.ceil(panels / max(strips, 1.0))))
        e.add(name, panels=float(panels))
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


def _kernel(name: str) -> Callable[[Effort], None]:
    """One kernel that makes the entries where it needs them, forward and backward."""

    def count(e: Effort) -> None:
        p, pairs = e.problem, e.seen(KERNEL)
        wide = float(e.size + e.value)
        for way in ("", "backward ")[: 1 if e.way == "forward" else 2]:
            e.add(f"{name} call", **{f"{way}once": 1.0})
            e.add(
                f"{name} {way}{e.format}",
                products=e.units * pairs * wide,
                scores=e.units * pairs,
                rows=e.units * p.queries * wide,
                keys=e.units * p.keys * wide,
                blocks=float(e.units * math.ceil(p.queries / KERNEL)),
                dropped=e.units * pairs * (p.dropout > 0.0),
            )
            for term in e.terms:
                if not isinstance(term, Window):
                    number = e.units * pairs * term.entry_cost
                    e.add(f"{name} {way}reads", **{kind(term): number})
                    if way and e.way == "learned" and term.requires_grad:
                        e.add(f"{name} sums", **{kind(term): number})

    return count


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
    "triton": _kernel("triton"),
    "flex": _kernel("flex"),
}
# Whose backward pass is that by tiles, whether the bias learns or not.
BY_TILES = ("stream", "windows")
OWN_BACKWARD = ("own", "packed", "triton", "flex")


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
