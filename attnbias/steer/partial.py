"""Shares of attention without going over the keys twice.

Attention over each group of keys by itself gives the shares (by the log-sum-exps) and, with other
weights, the edited output. Either all groups are computed apart, each key once; or one group, the
base, is what is left of the model's own output without the others, which then are few keys:

.. math:: o' = r_0\\, o + \\sum_{g > 0} (r_g - r_0)\\, m_g\\, o_g, \\qquad r_g = m'_g / m_g

A few queries (a decoded token) are computed in whole rows instead: `attnbias.steer.lines`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from attnbias.steer.groups import Exact, Groups, Lane
from attnbias.steer.pieces import Part, Piece, described
from attnbias.steer.placing import numbers
from attnbias.steer.shares import on_heads

if TYPE_CHECKING:
    from attnbias.hub import Call
    from attnbias.steer.edit import Edit

MANY = 256  # queries from which the groups are computed apart
MANY_OWN = 1024  # the same where each head has groups of its own: small calls for each
RUNS = 8  # stretches of keys that are worth a call of their own
HOLES = 8  # the scattered keys are at most this part of all
PREFIX = 256  # rows that see one group alone are left out from this many on
# The base keeps at least this share of every row: what it gets is known up to rounding then.
LEAST = 0.05
FEW_ROWS = 16  # of so many rows one may be an exception, and is computed anew


class Plan(NamedTuple):
    """How the groups of one row of the batch (or all) are computed.

    stretches: (group, start, stop). picked: the groups whose keys stand alone. base: the group that
    takes the rest, -1 where the others are all. hidden: bool ``(keys)``, those of `picked`.
    """

    stretches: list[tuple[int, int, int]]
    picked: list[int]
    base: int
    hidden: Tensor | None


def split(
    edit: Edit, heads: tuple[int, ...], groups: Tensor, count: int, first: int = 0
) -> Groups | None:
    """The groups one by one, or None where one pass over all keys is better or needed.

    Args:
        groups: ``(batch | 1, heads | 1, keys)``. Where heads have groups of their own, one must be
            most of every head's keys.
        first: the first row that may change.
    """
    call, queries = edit.call, edit.shape[2]
    own = groups.shape[1] > 1
    if queries < (MANY_OWN if own else MANY) or edit.extras or edit.folds or count > RUNS:
        return None
    tensors = on_heads(edit, heads)
    asks = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    if asks or torch.is_autocast_enabled(tensors[0].device.type):
        return None
    found = described(edit, heads)
    if found is None:
        return None
    query, key, value = tensors
    part = Part(query, key, value, found.offset, found.keys, call.scale)
    if own:
        plans = [_of_heads(groups, count)]
    else:
        same = groups.shape[0] == 1 or bool((groups == groups[:1]).all())
        lines = groups[:1, 0] if same else groups[:, 0]
        plans = [_plan(line, count) for line in lines]
        # What sees one group alone cannot change.
        alone = edit.biases is None and found.keys is None and call.sink is None
        if found.offset is not None and alone:
            first = max(first, min(_second(line) for line in lines) - found.offset)
    if any(plan is None for plan in plans):
        return None
    first = 0 if edit.biases is not None or first < PREFIX else min(first, queries - 1)
    if own:
        assert plans[0] is not None
        pieces = _own_pieces(part.later(first), groups, count, plans[0].base)
        lanes = [Lane(slice(None), pieces)]
    else:
        lanes = []
        for number, (plan, line) in enumerate(zip(plans, lines, strict=True)):
            assert plan is not None
            row = slice(number, number + 1) if len(plans) > 1 else slice(None)
            lanes.append(Lane(row, _pieces(_lane(part, row).later(first), plan, line)))
    bases = {plan.base for plan in plans if plan is not None}
    base = bases.pop() if len(bases) == 1 else -1
    if base >= 0:
        made = _besides(edit, heads, lanes, part.later(first), count, first, base, groups)
        if made is not None:
            return made
    for lane, plan, line in zip(lanes, plans, groups if own else lines, strict=False):
        assert plan is not None
        if plan.base >= 0:
            rest = _lane(part, lane.batch).later(first)
            hidden = groups != plan.base if own else line != plan.base
            lane.pieces.extend(rest.all_but(plan.base, hidden))
    return _apart(call, heads, lanes, part.later(first), count, first, groups)


# Plans --------------------------------------------------------------------------------------------


def _plan(groups: Tensor, count: int) -> Plan | None:
    """For groups ``(keys)``."""
    kinds, lengths = torch.unique_consecutive(groups, return_counts=True)
    if len(kinds) <= RUNS:
        return Plan(_runs(kinds, lengths.cumsum(0)), [], -1, None)
    sizes = torch.bincount(groups.long(), minlength=count)
    order = sizes.argsort().tolist()
    picked, left = [], len(groups) // HOLES
    for number in order[:-1]:
        left -= int(sizes[number])
        if left < 0:
            break
        picked.append(number)
    hidden = torch.isin(groups, torch.tensor(picked, device=groups.device))
    kept = (~hidden).nonzero()[:, 0]
    kinds, lengths = torch.unique_consecutive(groups[kept], return_counts=True)
    if len(kinds) > RUNS:
        return None
    base = order[-1]
    ends = kept[lengths.cumsum(0) - 1] + 1
    runs = [run for run in _runs(kinds, ends) if run[0] != base]
    return Plan(runs, picked, base, hidden)


def _runs(kinds: Tensor, ends: Tensor) -> list[tuple[int, int, int]]:
    stops = ends.tolist()
    return list(zip(kinds.tolist(), [0, *stops[:-1]], stops, strict=True))


def _of_heads(groups: Tensor, count: int) -> Plan | None:
    """For groups ``(batch | 1, heads, keys)``: the largest is the base, the rest is picked."""
    sizes = torch.bincount(groups.flatten().long(), minlength=count)
    base = int(sizes.argmax())
    if int((groups != base).sum(-1).max()) * HOLES > groups.shape[2]:
        return None
    return Plan([], [number for number in range(count) if number != base], base, None)


def _second(groups: Tensor) -> int:
    """The first key that is of another group than key 0."""
    other = (groups != groups[0]).nonzero()
    return int(other[0]) if len(other) else len(groups)


# Pieces -------------------------------------------------------------------------------------------


def _lane(part: Part, row: slice) -> Part:
    if row == slice(None):
        return part
    own = part.row if part.row is None or part.row.shape[0] == 1 else part.row[row]
    query, key, value = (t[row] for t in (part.query, part.key, part.value))
    return Part(query, key, value, part.offset, own, part.scale)


def _pieces(part: Part, plan: Plan, groups: Tensor) -> list[Piece]:
    """All pieces of a plan but the base."""
    found: list[Piece] = []
    for group, start, stop in plan.stretches:
        found += part.stretch(group, start, stop, plan.hidden)
    for group in plan.picked:
        found += part.picked(group, (groups == group).nonzero()[:, 0])
    return found


def _own_pieces(part: Part, groups: Tensor, count: int, base: int) -> list[Piece]:
    """Groups of each head, but the base: head by head."""
    batch, heads, queries, _ = part.query.shape
    found = []
    for number in range(count):
        chosen = groups == number
        if number == base or not bool(chosen.any()):
            continue
        shape = (batch, heads, queries)
        out = part.query.new_zeros(*shape, part.value.shape[-1])
        kind = torch.float64 if out.dtype == torch.float64 else torch.float32
        lse = torch.full(shape, -torch.inf, dtype=kind, device=out.device)
        for row in range(batch):
            for head in range(heads):
                index = chosen[row if groups.shape[0] > 1 else 0, head].nonzero()[:, 0]
                for piece in part.of(row, head).picked(number, index):
                    out[row, head], lse[row, head] = piece.out[0, 0], piece.lse[0, 0]
        found.append(Piece(number, slice(0, queries), out, lse))
    return found


# Shares -------------------------------------------------------------------------------------------


def _lses(lanes: Sequence[Lane], shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """The log-sum-exp of each group ``(batch, heads, rows, groups)``."""
    kind = torch.float64 if like.dtype == torch.float64 else torch.float32
    found = torch.full(shape, -torch.inf, dtype=kind, device=like.device)
    for batch, pieces in lanes:
        for piece in pieces:
            place = found[batch][:, :, piece.rows, piece.group]
            place.copy_(torch.logaddexp(place, piece.lse))
    return found


def _apart(
    call: Call,
    heads: tuple[int, ...],
    lanes: Sequence[Lane],
    part: Part,
    count: int,
    first: int,
    groups: Tensor,
) -> Groups:
    batch, number, rows, _ = part.query.shape
    lses = _lses(lanes, (batch, number, rows, count), part.query)
    total = lses
    if call.sink is not None:
        own_sink = call.sink[list(heads)].to(lses.dtype)[None, :, None, None]
        total = torch.cat([lses, own_sink.expand(*lses.shape[:3], 1)], -1)
    norm = torch.logsumexp(total, -1, keepdim=True)
    masses = (lses - torch.where(norm == -torch.inf, 0.0, norm)).exp()
    if first:
        before = masses.new_zeros(batch, number, first, count)
        if groups.shape[1] == 1:  # what sees one group alone gives it everything
            starts = groups[:, 0, :1].long()[:, None, None].expand(batch, number, first, 1)
            before.scatter_(-1, starts, 1.0)
        masses = torch.cat([before, masses], 2)
    return Groups(heads, first, masses, tuple(lanes), lses)


def _besides(
    edit: Edit,
    heads: tuple[int, ...],
    lanes: Sequence[Lane],
    part: Part,
    count: int,
    first: int,
    base: int,
    groups: Tensor,
) -> Groups | None:
    """Beside the model's own output, where that is to be had and the base is large in most rows."""
    call = edit.call
    if edit.biases is not None or not edit.vectors_stay:
        return None
    plain, lse = call.plain_with_lse()
    if lse is None or call.sink is not None:
        return None
    if len(heads) < lse.shape[1]:
        lse = lse.index_select(1, numbers(tuple(heads), lse.device))
    rows = lse[:, :, first:]
    lses = _lses(lanes, (*rows.shape, count), call.query)
    blind = rows == -torch.inf
    masses = (lses - torch.where(blind, 0.0, rows)[..., None]).exp()
    masses[..., base] = torch.where(blind, 0.0, 1 - masses.sum(-1))
    exact: Exact | None = None
    little = ((masses[..., base] < LEAST) & ~blind).flatten(0, 1).any(0).nonzero()[:, 0]
    if len(little) * FEW_ROWS > masses.shape[2]:
        return None
    if len(little):
        out, own = part.rows(little, groups != base)
        lses[:, :, little, base] = own
        known = lses.index_select(2, little)
        norm = known.logsumexp(-1, keepdim=True)
        masses[:, :, little] = (known - torch.where(norm == -torch.inf, 0.0, norm)).exp()
        exact = Exact(little, out, own)
    if first:
        before = masses.new_zeros(*masses.shape[:2], first, count)
        before[..., base] = 1.0
        masses = torch.cat([before, masses], 2)
    return Groups(heads, first, masses, tuple(lanes), lses, base, plain, exact)
