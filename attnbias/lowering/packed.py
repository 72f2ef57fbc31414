"""Packed sequences, one after the other: a segment is a problem of its own, without a mask.

Where every segment is one range of keys, its queries see that range and nothing else: the rest of
the bias is cut to it, and the planner takes the best lowering for each. The cost is that of the
pairs that are seen, and a call for each range of queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from attnbias.bias import Bias, Segments, add
from attnbias.lowering import flash
from attnbias.lowering.problem import Lowering, Offer, Problem

SHORTEST = 64  # queries of a range, on average: below, calls cost more than tiles that hide pairs
CALL = 1.5e-4 / 2e-11  # seconds of a call, in features of scores (see `tile_cost`), on two cores

# Rows of a batch, queries and keys that belong to one segment.
Part = tuple[slice, slice, slice]


class Packed(Lowering):
    """`Segments` in contiguous ranges, with any other bias. Memory O(queries + keys)."""

    name = "packed"

    def offer(self, problem: Problem) -> Offer:
        segments, _ = split(problem)
        if len(segments) != 1:
            what = "there are no segments" if not segments else "there are two kinds of segments"
            return self.refuse(what)
        ids = segments[0]
        if ids.query_ids.is_meta or ids.key_ids.is_meta:
            return self.refuse("ids on the meta device have no values")
        if problem.empty:
            return self.bid(1.0, 0, "nothing to compute")
        parts = ranges(problem)
        if parts is None:
            return self.refuse("a segment lies in several ranges of keys")
        rows = sum(_length(batch) * _length(row) for batch, row, _ in parts)
        if rows < SHORTEST * len(parts):
            return self.refuse(f"{len(parts)} short segments would need as many calls")
        whole = problem.batch * problem.queries * problem.keys
        work = whole * problem.heads * (problem.query.shape[-1] + 12.0)
        time = 1.1 * pairs(parts) / whole + len(parts) * CALL / work
        return self.bid(round(time, 3), 0, f"{len(parts)} segments, each without a mask")

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        from attnbias.lowering.planner import choose  # which knows this lowering

        if problem.empty or problem.value.shape[-1] == 0:
            return flash.flash(problem.query, problem.key, problem.value, scale=problem.scale)
        _, rest = split(problem)
        parts = ranges(problem)
        assert parts is not None
        outs: dict[int, list[tuple[Tensor, Tensor]]] = {}
        cut = _Cut(problem, parts)
        for place, (batch, rows, cols) in enumerate(parts):
            query, key, value = cut.tensors(place)
            bias = None if rest is None else rest[batch, :, rows, cols]
            own = dataclasses.replace(problem, query=query, key=key, value=value, bias=bias)
            outs.setdefault(batch.start, []).append(choose(own).run(own))
        joined = [
            tuple(torch.cat(t, 2) for t in zip(*found, strict=True)) for found in outs.values()
        ]
        if len(joined) == 1:
            return joined[0][0], joined[0][1]
        return torch.cat([out for out, _ in joined]), torch.cat([lse for _, lse in joined])


def split(problem: Problem) -> tuple[list[Segments], Bias | None]:
    """The segments of a bias, and the rest of it."""
    terms = [] if problem.bias is None else problem.bias.terms()
    rest = [t for t in terms if not isinstance(t, Segments)]
    return [t for t in terms if isinstance(t, Segments)], add(*rest) if rest else None


def pairs(parts: list[Part]) -> int:
    """Pairs of query and key that are seen."""
    return sum(_length(b) * _length(r) * _length(c) for b, r, c in parts)


def _length(part: slice) -> int:
    return int(part.stop - part.start)


def _runs(ids: Tensor) -> list[tuple[int, slice]]:
    """``(id, range)`` of each run of equal ids."""
    values, counts = torch.unique_consecutive(ids, return_counts=True)
    ends = counts.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(v, slice(a, b)) for v, a, b in zip(values.tolist(), starts, ends, strict=True)]


def ranges(problem: Problem) -> list[Part] | None:
    """The ranges of queries with the keys they see, in order; None where keys are scattered. Made
    once for a problem with one kind of segments: the offer and the run both need them.
    """
    if "ranges" not in problem.__dict__:
        (ids,), _ = split(problem)
        problem.__dict__["ranges"] = found_ranges(ids, problem.batch)
    found: list[Part] | None = problem.__dict__["ranges"]
    return found


def found_ranges(ids: Segments, batch: int) -> list[Part] | None:
    """`ranges` of one kind of segments."""
    if ids.batch == 1:
        rows = [(slice(0, batch), ids.query_ids[0], ids.key_ids[0])]
    else:
        pairs_of = zip(
            ids.query_ids.expand(ids.batch, -1), ids.key_ids.expand(ids.batch, -1), strict=True
        )
        rows = [(slice(b, b + 1), q, k) for b, (q, k) in enumerate(pairs_of)]
    found: list[Part] = []
    for part, queries, keys in rows:
        runs = _runs(keys)
        where = dict(runs)
        if len(where) < len(runs):
            return None
        nothing = slice(0, 0)
        found += [(part, run, where.get(value, nothing)) for value, run in _runs(queries)]
    return found


class _Cut:
    """The tensors of each part. They are cut at once: the gradient of one slice after the other
    would be a tensor of the full length for each.
    """

    def __init__(self, problem: Problem, parts: list[Part]) -> None:
        self.problem, self.parts = problem, parts
        self.pieces: list[dict[int, tuple[Tensor, ...]]] = [{}, {}, {}]
        self.starts: list[dict[int, dict[int, int]]] = [{}, {}, {}]
        for batch in dict.fromkeys(part[0].start for part in parts):
            mine = [part for part in parts if part[0].start == batch]
            self._cut(0, problem.query[mine[0][0]], batch, [rows for _, rows, _ in mine])
            for place, tensor in ((1, problem.key), (2, problem.value)):
                self._cut(place, tensor[mine[0][0]], batch, [cols for _, _, cols in mine])

    def _cut(self, place: int, tensor: Tensor, batch: int, ranges: list[slice]) -> None:
        edges = sorted({0, tensor.shape[2], *(e for r in ranges for e in (r.start, r.stop))})
        sizes = [b - a for a, b in pairwise(edges)]
        self.pieces[place][batch] = torch.split(tensor, sizes, 2)
        self.starts[place][batch] = {edge: number for number, edge in enumerate(edges)}

    def tensors(self, place: int) -> Iterator[Tensor]:
        """Query, key and value of a part."""
        batch, rows, cols = self.parts[place]
        for kind, part in enumerate((rows, cols, cols)):
            pieces = self.pieces[kind][batch.start]
            if part.stop == part.start:
                yield pieces[0][:, :, :0]
            else:
                yield pieces[self.starts[kind][batch.start][part.start]]
