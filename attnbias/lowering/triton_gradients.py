"""The backward pass of the Triton lowering: which kernel makes the gradient of which parameter.

Sums over columns, diagonals and factors, and those of distances, come out of the passes that make
the gradients of queries, keys and values; every other parameter is reached through the gradient of
the entries (`triton_entries`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnbias.bias import Bias, Distance, KeyBias, LowRank, Relative
from attnbias.kernels.backward_launch import Found, Wanted, Work, backward_pass, query_blocks
from attnbias.kernels.points_gradients import Slots
from attnbias.lowering import triton_entries, triton_factors, triton_parts, triton_points
from attnbias.lowering.problem import Problem
from attnbias.lowering.total import Total


@dataclass
class Learned:
    """Terms whose parameters want a gradient, by their place in `Bias.terms`."""

    rows: list[int] = field(default_factory=list)
    tables: list[int] = field(default_factory=list)
    factors: list[int] = field(default_factory=list)
    points: list[int] = field(default_factory=list)
    entries: list[int] = field(default_factory=list)

    @staticmethod
    def of(terms: Sequence[Bias]) -> Learned:
        found = Learned()
        for at, term in enumerate(terms):
            if not term.requires_grad or term.rank == 0:
                continue
            if isinstance(term, KeyBias):
                found.rows.append(at)
            elif isinstance(term, Relative):
                found.tables.append(at)
            elif isinstance(term, LowRank):
                found.factors.append(at)
            elif isinstance(term, Distance) and _on_chip(term):
                found.points.append(at)
            else:
                found.entries.append(at)
        return found


def gradients(
    problem: Problem,
    out: Tensor,
    lse: Tensor,
    grad: Tensor | None,
    grad_lse: Tensor | None,
    wanted: Sequence[bool],
    parameters: Sequence[Tensor],
    wanted_parameters: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients to query, key, value and the parameters of the bias; None where not `wanted`."""
    query, key, value = problem.query, problem.key, problem.value
    if problem.empty:
        every = [query, key, value, *parameters]
        asked = [*wanted, *wanted_parameters]
        return [torch.zeros_like(t) if w else None for t, w in zip(every, asked, strict=True)]
    if value.shape[-1] == 0:
        # There is a log-sum-exp without values, too: of one feature of zeros.
        feature = value.new_zeros(*value.shape[:3], 1)
        wide = dataclasses.replace(problem, value=feature)
        none = out.new_zeros(*out.shape[:3], 1)
        asked = [*wanted[:2], False]
        dq, dk, _, *rest = gradients(
            wide, none, lse, None, grad_lse, asked, parameters, wanted_parameters
        )
        return [dq, dk, torch.zeros_like(value) if wanted[2] else None, *rest]
    total = Total(problem.bias, parameters, wanted_parameters)
    terms = [] if total.bias is None else total.bias.terms()
    learned = Learned.of(terms)
    given = triton_parts.give(
        problem, None if total.bias is None else total.bias.detach(), parts=True
    )
    work = Work.of(query, key, value, out, lse, grad, grad_lse, problem.scale, given)
    want = Wanted(
        wanted[0],
        wanted[1],
        wanted[2],
        row=bool(learned.rows),
        line=_tables(terms, learned.tables),
    )
    if learned.factors:
        want = dataclasses.replace(want, factors=_factors(terms, learned.factors, query.device))
    numbers: list[int] = []
    slots: list[Slots] = []
    if learned.points:
        want, numbers, slots = _points(work, want, terms, learned.points)
    found = backward_pass(work, want)
    _pull(total, terms, learned, found)
    for at, number, slot in zip(learned.points, numbers, slots, strict=True):
        term = terms[at]
        assert isinstance(term, Distance)
        total.take(term.parameters(), triton_points.gradients(term, number, slot))
    if learned.entries:
        triton_entries.pull(work, learned.entries, total)
    return [found.query, found.key, found.value, *total.results()]


def _tables(terms: Sequence[Bias], places: Sequence[int]) -> tuple[int, int] | None:
    """Batch and heads of learned tables together."""
    some = [terms[at] for at in places]
    return (max(t.batch for t in some), max(t.heads for t in some)) if some else None


def _factors(
    terms: Sequence[Bias], places: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The learned factors side by side, in float32."""
    pairs = [terms[at].parameters() for at in places]
    found, _ = triton_factors.columns(
        [(u, v) for u, v in pairs], torch.float32, device, parts=False
    )
    assert found is not None
    return found.left, found.right


def _on_chip(term: Distance) -> bool:
    asked = [p.requires_grad for p in term.parameters()]
    return not triton_points.small(term) and triton_points.on_chip(term, asked)


def _points(
    work: Work, want: Wanted, terms: Sequence[Bias], places: Sequence[int]
) -> tuple[Wanted, list[int], list[Slots]]:
    """What the passes sum for distances, for each term that the kernels read."""
    kinds = work.given.kinds
    read = [t for t, term in enumerate(terms) if _read_as_points(term)]
    kernel_places = [k for k, kind in enumerate(kinds) if kind[0] == "points"]
    assert len(read) == len(kernel_places)
    (batch, heads, n, _), (groups, m) = work.query.shape, work.key.shape[1:3]
    numbers, slots = [], []
    all_numbers, all_slots = [0] * len(kinds), [Slots(*[work.delta] * 4)] * len(kinds)
    for at in places:
        term = terms[at]
        assert isinstance(term, Distance)
        number = triton_points.wanted(term, [p.requires_grad for p in term.parameters()])
        shape = (batch, heads, groups, n, m)
        slot = triton_points.slots(term, number, shape, query_blocks(work, want))
        k = kernel_places[read.index(at)]
        all_numbers[k], all_slots[k] = number, slot
        numbers.append(number)
        slots.append(slot)
    made = dataclasses.replace(
        want,
        points_rows=tuple(all_numbers) if any(w % 4 for w in numbers) else None,
        points_cols=tuple(all_numbers) if any(w >= 4 for w in numbers) else None,
        slots=tuple(all_slots),
    )
    return made, numbers, slots


def _read_as_points(term: Bias) -> bool:
    return isinstance(term, Distance) and not triton_points.small(term)


def _pull(total: Total, terms: Sequence[Bias], learned: Learned, found: Found) -> None:
    """Add what the passes summed to the parameters."""

    def give(at: int, *grads: Tensor | None) -> None:
        stored = terms[at].parameters()
        made = [
            None if g is None else g.sum_to_size(p.shape).to(p.dtype)
            for g, p in zip(grads, stored, strict=True)
        ]
        total.take(stored, made)

    for at in learned.rows:
        give(at, found.row)
    for at in learned.tables:
        give(at, found.line)
    first = 0
    for at in learned.factors:
        assert found.left is not None
        assert found.right is not None
        last = first + terms[at].parameters()[0].shape[-1]
        give(at, found.left[..., first:last], found.right[..., first:last])
        first = last


__all__ = ["Learned", "gradients"]
