"""What is true on sampled rows, in float64 and in plain tensor operations; how far a line is off.

The gradient that arrives at the output in a check is zero except at the sampled rows of the sampled
batch elements, so that every gradient is known from those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu.case import Case, Parameters

WRONG = 1e30  # an error that is no number


@dataclass(frozen=True)
class Answer:
    """output ``(batches, heads, rows, size)`` of the sampled rows; gradients by name: query of the
    sampled rows, key and value of the sampled elements, and parameters whole.
    """

    output: Tensor
    gradients: dict[str, Tensor]


def sparse(case: Case, gradient: Tensor) -> Tensor:
    """`gradient` at the sampled rows, zero elsewhere."""
    found = torch.zeros_like(gradient)
    b, i = case.picked.batches[:, None, None], case.picked.rows
    h = torch.arange(case.heads, device=gradient.device)[:, None]
    found[b, h, i] = gradient[b, h, i]
    return found


def at_rows(case: Case, tensor: Tensor) -> Tensor:
    return tensor[case.picked.batches][:, :, case.picked.rows]


def answer(
    case: Case, inputs: tuple[Tensor, ...], parameters: Parameters, *, biased: bool = True
) -> Answer:
    """Attention of the sampled rows under the bias (or under none)."""
    picked, train = case.picked, case.training
    query, key, value, gradient = inputs
    leaves = {
        "query": at_rows(case, query).double(),
        "key": key[picked.batches].double(),
        "value": value[picked.batches].double(),
    }
    given = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in parameters.items()
    }
    if train:
        for name in leaves:
            leaves[name].requires_grad_()
        if biased:
            for name in case.kind.learned:
                leaves[name] = given[name] = given[name].clone().requires_grad_()
    share = case.heads // case.key_heads
    k, v = (leaves[name].repeat_interleave(share, 1) for name in ("key", "value"))
    with torch.enable_grad():
        scores = leaves["query"] @ k.mT * case.size**-0.5
        if biased:
            scores = scores + case.kind.rows(case, given, picked)
        if case.causal:
            keys = torch.arange(case.m, device=query.device)
            late = keys > picked.rows[:, None] + case.m - case.queries
            scores = scores.masked_fill(late, -math.inf)
        output = scores.softmax(-1) @ v
    slopes: dict[str, Tensor] = {}
    if train:
        step = at_rows(case, gradient).double()
        found = torch.autograd.grad(output, list(leaves.values()), step)
        slopes = dict(zip(leaves, found, strict=True))
    return Answer(output.detach(), slopes)


def errors(
    case: Case, want: Answer, output: Tensor, gradients: Mapping[str, Tensor]
) -> dict[str, float]:
    """Largest error over the largest true entry, of the output and of each gradient."""
    found = {"output": gap(at_rows(case, output), want.output)}
    for name, slope in gradients.items():
        if name == "query":
            slope = at_rows(case, slope)
        elif name in ("key", "value"):
            slope = slope[case.picked.batches]
        found[name] = gap(slope, want.gradients[name]) if name in want.gradients else WRONG
    return found


def gap(found: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest true entry."""
    largest = (found.detach().double() - wanted).abs().nan_to_num(nan=math.inf).max()
    scale = max(float(wanted.abs().max()), 1e-30)
    return min(float(f"{float(largest) / scale:.3g}"), WRONG)
