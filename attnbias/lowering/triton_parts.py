"""A bias, sorted into what the Triton kernels read: terms, factors, a band and ranges of keys."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from attnbias.bias import (
    Bias,
    Dense,
    Distance,
    KeyBias,
    LowRank,
    Padding,
    Relative,
    Segments,
    Window,
)
from attnbias.bias.base import to_mask
from attnbias.bias.masks import meet
from attnbias.kernels import ranges
from attnbias.kernels.kinds import Kind
from attnbias.kernels.launch import Given
from attnbias.kernels.pattern import Drop
from attnbias.kernels.terms import Row, strip
from attnbias.lowering import dropout, triton_factors, triton_points, triton_terms
from attnbias.lowering.problem import Problem
from attnbias.lowering.triton_terms import Term, lines, steps

# What is sorted here; every other structure is asked for in `triton_terms`.
PLAIN = (Window, KeyBias, Padding, Relative, LowRank, Segments)


def reason(bias: Bias | None) -> str:
    """Why the kernels cannot read a bias, judged by kind and shape alone; empty where they can."""
    for term in [] if bias is None else bias.terms():
        if isinstance(term, PLAIN):
            continue
        refuse = triton_points.refusal if isinstance(term, Distance) else triton_terms.refusal
        why = refuse(term)  # type: ignore[arg-type]
        if why:
            return why
    return ""


def give(problem: Problem, bias: Bias | None, *, parts: bool = False) -> Given:
    """`bias`: that of the problem, without gradients.

    Like structures become one term: key biases and paddings with gaps a row, relative biases a
    table. Of several `LowRank` the columns lie side by side in the order of `Bias.terms`; with
    `parts` they are those of `triton_factors`, split for half formats, else the stored ones.
    """
    device = problem.query.device
    rows: list[Tensor] = []
    tables: list[Tensor] = []
    factors: list[tuple[Tensor, Tensor]] = []
    others: list[Term] = []
    band: tuple[int | None, int | None] = (None, None)
    seen: ranges.Ranges | None = None
    for term in [] if bias is None else bias.terms():
        found: ranges.Ranges | None = None
        if isinstance(term, Window):
            band = meet(band, term.band())
        elif isinstance(term, KeyBias):
            rows.append(term.weight)
        elif isinstance(term, Padding):
            keep = term.keep.to(device)
            found = ranges.of_padding(keep)
            if not found.whole:
                rows.append(to_mask(keep)[:, None])
        elif isinstance(term, Dense) and term.queries is None and term.keys is not None:
            rows.append(term.tensor[:, :, 0])
        elif isinstance(term, Relative):
            tables.append(term.table)
        elif isinstance(term, LowRank):
            factors.append((term.u, term.v))
        elif isinstance(term, Segments):
            ids = term.query_ids.to(device), term.key_ids.to(device)
            found = ranges.of_segments(*ids)
            if not found.whole:
                others.append(triton_terms.of_segments(*ids))
        elif isinstance(term, Distance):
            others.append(triton_points.made(term, device))
        else:
            others += triton_terms.made(term, device)
            found = triton_terms.of_neighborhood(term, device)
        if found is not None:
            seen = ranges.meet(seen, found)
    if rows:
        row = _sum(rows, device)
        others.insert(0, ("row", Row(row, *steps(row, 2))))
    if tables:
        table = _sum(tables, device)
        others.insert(0, ("strip", strip(table)))
    places, sides, ranged = ranges.places(band, seen, problem.queries, problem.keys)
    columns, rank = triton_factors.columns(factors, problem.query.dtype, device, parts=parts)
    return Given(
        tuple(term for _, term in others),
        tuple(Kind(kind) if isinstance(kind, tuple) else kind for kind, _ in others),
        columns,
        rank,
        places,
        sides,
        ranged,
        _drop(problem),
    )


def _sum(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Of rows or tables ``(batch | 1, heads | 1, length)``."""
    return functools.reduce(torch.add, [lines(t, device) for t in tensors])


def _drop(problem: Problem) -> Drop | None:
    if not problem.dropout:
        return None
    one, two = dropout.row_keys(problem.seed, problem.query)
    n, heads = problem.queries, problem.heads
    limit, factor = dropout.limit(problem.dropout), 1.0 / (1.0 - problem.dropout)
    return Drop(one.contiguous(), two.contiguous(), heads * n, n, limit, factor)


__all__ = ["PLAIN", "give", "reason"]
