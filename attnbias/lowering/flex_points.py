"""`Distance` for FlexAttention: coordinates and coefficients as single columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Distance
from attnbias.bias.metric import root
from attnbias.bias.radial import Basis

Kind = tuple[Any, ...]


def points(term: Distance) -> tuple[Kind, tuple[Tensor, ...]]:
    """Kind and tensors of a `Part`.

    Coordinates in float64 come as two float32 numbers each, so that differences of close points,
    and of points near the antipode, keep the accuracy of float32. A missing one is 0, and minus
    infinity is added to its row or column.
    """
    assert isinstance(term.radial, Basis)
    kind = torch.promote_types(torch.promote_types(term.x.dtype, term.y.dtype), term.dtype)
    pairs = kind == torch.float64 and term.dtype == torch.float32
    tensors: list[Tensor] = []
    gone: list[Tensor] = []
    outers = []
    for side in (term.x, term.y):
        there = side.isfinite()
        side = torch.where(there, side, 0.0).to(kind)
        outer = (side.shape[0] != 1,)
        side = side if outer[0] else side[0]
        high = side.to(term.dtype)
        tensors += high.unbind(-1)
        if pairs:
            tensors += (side - high).detach().float().unbind(-1)
        missing = torch.zeros(there.shape[:2], dtype=term.dtype, device=side.device)
        missing = missing.masked_fill(~there.all(-1), -torch.inf)
        gone.append(missing if outer[0] else missing[0])
        outers.append(outer)
    tensors += gone
    a, b, c = term.radial.coefficients()
    per_head = a.shape[0] != 1
    used = {"linear": (a,), "exponential": (a, b), "bell": (a, b, c)}[term.radial.form]
    for coefficient in used:
        columns = coefficient.to(term.dtype).unbind(-1)
        tensors += [column.reshape(-1) for column in columns]
    weights: list[tuple[bool, ...] | None] = []
    for weight in (term.weight, term.key_weight):
        if weight is None:
            weights.append(None)
            continue
        left = tuple(n != 1 for n in weight.shape[:2])
        tensors.append(weight.squeeze([d for d, stays in enumerate(left) if not stays]))
        weights.append(left)
    how = (
        term.metric.name,
        term.x.shape[-1],
        term.metric.causal,
        term.metric.flipped,
        pairs,
        term.radial.form,
        term.radial.squared,
        a.shape[1],
        per_head,
    )
    return ("points", how, *outers, *weights), tuple(tensors)


def entry(
    kind: Kind, tensors: tuple[Tensor, ...], b: Tensor, h: Tensor, q: Tensor, k: Tensor
) -> Tensor:
    """One entry; b, h, q, k are places, tensors without dimensions."""
    _, how, outer_x, outer_y, outer, key_outer = kind
    metric, dims, causal, flipped, pairs, form, squared, bases, per_head = how
    rest = iter(tensors)
    x = [read(next(rest), outer_x, b, h, q) for _ in range(dims)]
    low_x = [read(next(rest), outer_x, b, h, q) for _ in range(dims * pairs)]
    y = [read(next(rest), outer_y, b, h, k) for _ in range(dims)]
    low_y = [read(next(rest), outer_y, b, h, k) for _ in range(dims * pairs)]
    missing = read(next(rest), outer_x, b, h, q) + read(next(rest), outer_y, b, h, k)
    distance = None
    if metric == "time":
        distance = x[0] - y[0]
        if pairs:
            distance = distance + (low_x[0] - low_y[0])
        if flipped:
            distance = -distance
        if causal:
            missing = torch.where(distance >= 0, missing, -torch.inf)
        if squared:
            distance = distance * distance
    else:
        less = [x[d] - y[d] for d in range(dims)]
        if pairs:
            less = [less[d] + (low_x[d] - low_y[d]) for d in range(dims)]
        near = _total([part * part for part in less])
        if metric == "great_circle":
            more = [x[d] + y[d] for d in range(dims)]
            if pairs:
                more = [more[d] + (low_x[d] + low_y[d]) for d in range(dims)]
            far = _total([part * part for part in more])
            distance = 2 * torch.atan2(root(near), root(far))
            distance = distance * distance if squared else distance
        else:
            there = near < torch.inf
            missing = torch.where(there, missing, -torch.inf)
            near = torch.where(there, near, 0.0)
            distance = near if squared else root(near)
    head = h if per_head else h * 0
    count = {"linear": 1, "exponential": 2, "bell": 3}[form] * bases
    found = [next(rest)[head] for _ in range(count)]
    values = []
    for f in range(bases):
        if form == "linear":
            values.append(distance * found[f])
        elif form == "exponential":
            values.append(found[f] * torch.exp(-found[bases + f] * distance))
        else:
            step = distance - found[2 * bases + f]
            values.append(found[f] * torch.exp(-found[bases + f] * (step * step)))
    value = _total(values)
    if outer is not None:
        value = value * read(next(rest), outer, b, h, q)
    if key_outer is not None:
        value = value * read(next(rest), key_outer, b, h, k)
    return value + missing


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def read(tensor: Tensor, outer: tuple[bool, ...], b: Tensor, h: Tensor, *places: Tensor) -> Tensor:
    """An entry of a tensor whose batch and heads are there where `outer` says so."""
    index = [one for one, there in zip((b, h), outer, strict=False) if there]
    return tensor[tuple(index + list(places))]
