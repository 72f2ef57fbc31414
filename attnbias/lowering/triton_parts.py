"""A bias, sorted into what the Triton kernels read: terms, factors, a band and ranges of keys."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbias.bias import Bias, Dense, KeyBias, LowRank, Padding, Relative, Segments, Window
from attnbias.bias.base import to_mask
from attnbias.bias.masks import meet
from attnbias.kernels import ranges
from attnbias.kernels.configs import power
from attnbias.kernels.forward import Columns
from attnbias.kernels.launch import Given
from attnbias.kernels.pattern import Drop
from attnbias.kernels.terms import Row, Strip, Whole
from attnbias.lowering import dropout
from attnbias.lowering.problem import Problem

KNOWN = (Window, KeyBias, Padding, Relative, LowRank, Segments, Dense)


def reason(bias: Bias | None) -> str:
    """Why the kernels cannot read a bias, judged by kind and shape alone; empty where they can."""
    for term in [] if bias is None else bias.terms():
        if not isinstance(term, KNOWN):
            return f"no kernel makes the entries of {type(term).__name__}"
    return ""


def give(problem: Problem, bias: Bias | None) -> Given:
    """`bias`: that of the problem, without gradients."""
    terms: list[object] = []
    kinds: list[object] = []
    band: tuple[int | None, int | None] = (None, None)
    seen: ranges.Ranges | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    for term in [] if bias is None else bias.terms():
        if isinstance(term, Window):
            band = meet(band, term.band())
        elif isinstance(term, KeyBias):
            _take(terms, kinds, "row", Row(*_given(term.weight)))
        elif isinstance(term, Padding):
            found = ranges.of_padding(term.keep)
            seen = ranges.meet(seen, found)
            if not found.whole:
                _take(terms, kinds, "row", Row(*_given(to_mask(term.keep)[:, None])))
        elif isinstance(term, Relative):
            _take(terms, kinds, "strip", Strip(*_given(term.table)))
        elif isinstance(term, LowRank):
            left, right = _beside(left, term.u), _beside(right, term.v)
        elif isinstance(term, Dense):
            tensor = term.tensor
            _take(terms, kinds, "whole", Whole(tensor, *_steps(tensor, 4)))
        elif isinstance(term, Segments):
            found = ranges.of_segments(term.query_ids, term.key_ids)
            seen = ranges.meet(seen, found)
            if not found.whole:
                raise NotImplementedError
    device = problem.query.device
    places, sides, ranged = ranges.places(band, seen, problem.queries, problem.keys)
    columns = None
    rank = 0
    if left is not None and right is not None:
        rank = power(left.shape[-1])
        left, right = (_padded(t, rank) for t in (left, right))
        columns = Columns(left, *_steps(left, 3), right, *_steps(right, 3))
    drop = None
    if problem.dropout:
        one, two = (k.to(device) for k in dropout.row_keys(problem.seed, problem.query))
        n, heads = problem.queries, problem.heads
        limit, factor = dropout.limit(problem.dropout), 1.0 / (1.0 - problem.dropout)
        drop = Drop(one.contiguous(), two.contiguous(), heads * n, n, limit, factor)
    return Given(
        tuple(terms),
        tuple(kinds),
        columns,
        rank,
        places,
        sides,
        ranged,
        drop,
    )


def _take(terms: list[object], kinds: list[object], kind: object, term: object) -> None:
    terms.append(term)
    kinds.append(kind)


def _steps(tensor: Tensor, dims: int) -> list[int]:
    return [0 if n == 1 else s for n, s in zip(tensor.shape[:dims], tensor.stride(), strict=False)]


def _given(tensor: Tensor) -> tuple[Tensor, int, int]:
    """In float32 with contiguous lines, and the steps of batch and heads."""
    made = tensor.detach().float()
    made = made if made.stride(-1) == 1 else made.contiguous()
    batch, head = _steps(made, 2)
    return made, batch, head


def _beside(one: Tensor | None, two: Tensor) -> Tensor:
    """Columns side by side, with the batch and heads of both."""
    two = two.detach().float()
    if one is None:
        return two
    size = [max(a, b) for a, b in zip(one.shape[:2], two.shape[:2], strict=True)]
    return torch.cat([t.expand(*size, *t.shape[2:]) for t in (one, two)], -1)


def _padded(tensor: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, rank - tensor.shape[-1]))


__all__ = ["KNOWN", "give", "reason"]
