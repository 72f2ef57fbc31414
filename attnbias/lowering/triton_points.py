"""A `Distance` as the Triton kernels read it, and its gradients from what they sum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias, Distance, Radial
from attnbias.bias.radial import Basis
from attnbias.bias.table import Table
from attnbias.kernels.points import Points
from attnbias.kernels.points_gradients import Slots
from attnbias.kernels.terms import Whole

Term = tuple[object, tuple[Any, ...]]

METRICS = {"euclidean": "euclidean", "great_circle": "sphere", "time": "time"}
MOST = 16  # coordinates of a point that are unrolled
CHIP = 1024  # intervals of a table that is read from shared memory
PARAMETERS, QUERIES, KEYS = 1, 2, 4


def refusal(bias: Distance) -> str:
    """Why no kernel makes the entries of a distance, with what to do; empty where one does."""
    if bias.metric.function is not None:
        return (
            "a metric that is a Python function cannot be called by a kernel: use euclidean, "
            "great_circle or time, or coordinates of which one of these is the distance"
        )
    if bias.x.shape[-1] > MOST:
        return f"the kernels measure distances of points of at most {MOST} coordinates"
    if isinstance(bias.radial, Basis):
        return ""
    if not isinstance(bias.radial, Radial):
        return f"no kernel makes the values of {type(bias.radial).__name__}: write it as a Radial"
    if any(bias.learned):
        return "a Radial is read from a table, through which no gradient reaches coordinates"
    if small(bias) or bias.x.is_meta or bias.y.is_meta or _table(bias) is not None:
        return ""
    return (
        "a Radial is read from a table, and this one has none: allow a larger error, or compute it "
        "in float32"
    )


def small(bias: Distance) -> bool:
    """Whether entries are fewer than the nodes of a table: they are as well made at once."""
    return isinstance(bias.radial, Radial) and bias.queries * bias.keys < 512


def _table(bias: Distance) -> Table | None:
    """Of a `Radial`, over the distances that occur. Where coordinates alone are in float64, what
    the kernels add is in float32 all the same.
    """
    assert isinstance(bias.radial, Radial)
    return bias.radial.table(*bias._reach())


def error(bias: Bias | None) -> float:
    """Bound of what tables may add to an entry, rounding apart."""
    total = 0.0
    for term in [] if bias is None else bias.terms():
        if isinstance(term, Distance) and isinstance(term.radial, Radial) and not small(term):
            table = None if term.x.is_meta else _table(term)
            most = 1.0
            for weight in term._weights():
                most *= float(weight.detach().abs().max()) if weight.numel() else 1.0
            total += 0.0 if table is None else table.error * most
    return total


def made(bias: Distance, device: torch.device) -> Term:
    """What the kernels read of a distance that `refusal` lets through."""
    if small(bias):
        entries = bias.dense().detach().to(device, torch.float32)
        steps = [0 if n == 1 else s for n, s in zip(entries.shape, entries.stride(), strict=True)]
        return "whole", Whole(entries, *steps)
    metric, radial = bias.metric, bias.radial
    # The sign of time turns round in a transposed bias.
    sign = -1.0 if metric.flipped and metric.name == "time" else 1.0
    split = torch.promote_types(bias.x.dtype, bias.y.dtype) == torch.float64
    x, y = (_axes(sign * points.detach().to(device), split) for points in (bias.x, bias.y))
    low, per_unit = 0.0, 0.0
    if isinstance(radial, Basis):
        form, (a, b, c) = radial.form, (p.detach() for p in radial.coefficients())
        bases = a.shape[1]
        b = b.double() * -math.log2(math.e)
    else:
        table = _table(bias)
        assert table is not None
        values = table.values
        a = values[:, :-1]
        b = c = values[:, 1:] - a
        low, per_unit, bases = table.low, table.per_unit, a.shape[1]
        form = "chip" if bases <= CHIP else "table"
    a, b, c = (p.to(device, torch.float32).contiguous() for p in (a, b, c))
    weights = []
    for weight in (bias.weight, bias.key_weight):
        factor = x if weight is None else weight.detach().to(device, torch.float32).contiguous()
        weights += [factor, *_steps(factor)]
    head = a.shape[1] if a.shape[0] > 1 else 0
    given = [x, *_steps(x, True), y, *_steps(y, True), *weights, a, b, c, head, low, per_unit]
    term = Points(*given)
    weighted = (bias.weight is not None) + 2 * (bias.key_weight is not None)
    axes = bias.x.shape[-1]
    kind = (
        "points", METRICS[metric.name], axes, split, radial.squared, form, bases,
        metric.causal, weighted,
    )  # fmt: skip
    return kind, term


def _axes(points: Tensor, split: bool) -> Tensor:
    """``(batch, length, D)`` as ``(batch, D, length)`` in float32, low parts after the high."""
    high = points.float()
    if split:
        # What float32 holds of it may be infinite; then both are, and the point is missing.
        high = torch.cat([high, (points.double() - high.double()).float()], -1)
    return high.mT.contiguous()


def _steps(tensor: Tensor, second: bool = False) -> tuple[int, int]:
    """Of the first two dimensions; 0 broadcasts. second: of axes, which are always stepped."""
    one, two = tensor.stride()[:2]
    return (
        one if tensor.shape[0] > 1 else 0,
        two if second or tensor.shape[1] > 1 else 0,
    )


def on_chip(bias: Distance, asked: Sequence[bool]) -> bool:
    """Whether the kernels sum all gradients that are asked for; asked: of each of `parameters`."""
    other = bias.key_weight is not None and asked[-1]
    return isinstance(bias.radial, Basis) and not other


def wanted(bias: Distance, asked: Sequence[bool]) -> int:
    """What the kernels are to sum, as `points_gradients` has it."""
    rest = list(asked)
    want = 0
    for own, number in zip(bias.learned, (QUERIES, KEYS), strict=True):
        if own and rest.pop(0):
            want += number
    return want + PARAMETERS * any(rest)


def slots(bias: Distance, want: int, shape: tuple[int, int, int, int, int], blocks: int) -> Slots:
    """Room for the sums. shape: batch, heads, key heads, queries, keys; blocks: programs that
    share the queries of a head.
    """
    batch, heads, groups, n, m = shape
    axes = bias.x.shape[-1]
    nothing = bias.x.new_empty(0, dtype=torch.float32)

    def room(number: int, *size: int) -> Tensor:
        return nothing.new_empty(size) if want & number else nothing

    return Slots(
        room(PARAMETERS, batch, heads, blocks, _sums(bias)),
        room(PARAMETERS, batch, heads, n),
        room(QUERIES, batch, heads, axes, n),
        room(KEYS, batch, groups, axes, m),
    )


def _per(bias: Distance) -> int:
    """Sums of each basis."""
    assert isinstance(bias.radial, Basis)
    return {"linear": 1, "exponential": 2, "bell": 3}[bias.radial.form]


def _sums(bias: Distance) -> int:
    assert isinstance(bias.radial, Basis)
    return _per(bias) * bias.radial.coefficients()[0].shape[1]


def gradients(bias: Distance, want: int, given: Slots) -> tuple[Tensor | None, ...]:
    """Gradients to `bias.parameters()`, in their order; None where none was summed."""
    assert isinstance(bias.radial, Basis)
    found: list[Tensor | None] = []
    sign = -1.0 if bias.metric.flipped and bias.metric.name == "time" else 1.0
    sides = ((bias.x, given.x, QUERIES), (bias.y, given.y, KEYS))
    for own, (points, sums, number) in zip(bias.learned, sides, strict=True):
        if own:
            step = None
            if want & number:
                step = sums.double().sum(1).mT.sum_to_size(points.shape).to(points.dtype) * sign
            found.append(step)
    own_parameters = bias.radial.parameters()
    if not want & PARAMETERS:
        return (*found, *[None] * (len(own_parameters) + len(bias._weights())))
    a, b, _ = (p.detach().double() for p in bias.radial.coefficients())
    parts = given.parts.double().sum((0, 2)).sum_to_size(a.shape[0], given.parts.shape[3])
    parts = parts.reshape(*a.shape, _per(bias))
    each = [parts[..., 0]]
    if bias.radial.form == "exponential":
        each.append(-a * parts[..., 1])
    elif bias.radial.form == "bell":
        each += [-a * parts[..., 2], 2 * a * b * parts[..., 1]]
    for sums, stored in zip(each, own_parameters, strict=True):
        found.append(sums.reshape(stored.shape).to(stored.dtype))
    if bias.weight is not None:
        found.append(given.query.sum_to_size(bias.weight.shape).to(bias.weight.dtype))
    if bias.key_weight is not None:
        found.append(None)
    return tuple(found)


__all__ = ["error", "gradients", "made", "on_chip", "refusal", "slots", "small", "wanted"]
