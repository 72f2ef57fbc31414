"""The lines of the attention grid: the ways of computing that are timed against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import attnbias as ab
from benchmarks.problem import BATCH, BUCKETS, DIM, DTYPES, HEADS, MAX_DISTANCE, Problem

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_alibi(problem: Problem) -> Tensor:
    """ALiBi as the N x N tensor a user would pass, in the dtype of the query; built by rows."""
    n, columns = problem.length, torch.arange(problem.length)
    mask = torch.empty(BATCH, HEADS, n, n, dtype=DTYPES[problem.dtype])
    for start in range(0, n, 256):
        stop = min(start + 256, n)
        distance = columns - torch.arange(start, stop)[:, None]
        part = -problem.slopes[:, None, None] * distance.abs()
        if problem.causal:
            part.masked_fill_(distance > 0, -math.inf)
        mask[0, :, start:stop] = part
    return mask


def dense_bytes(problem: Problem, matrices: int) -> int:
    """The size of that many tensors of shape (batch, heads, N, N) in the dtype of the query."""
    return matrices * BATCH * HEADS * problem.length**2 * DTYPES[problem.dtype].itemsize


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Matmul, add, softmax, matmul."""
    scores = (q * DIM**-0.5) @ k.mT
    scores = scores + mask
    output: Tensor = scores.softmax(-1) @ v
    return output


def timed(problem: Problem, forward: Forward) -> Callable[[], Any]:
    """The call that is timed: the forward without a graph, or forward and gradients to q, k, v."""
    q, k, v = problem.inputs

    def only_forward() -> Tensor:
        with torch.no_grad():
            return forward(q, k, v)

    def both() -> tuple[Tensor, ...]:
        output = forward(q, k, v)
        return (output, *torch.autograd.grad(output, (q, k, v), problem.grad_output))

    return both if problem.backward else only_forward


class NotAvailable(RuntimeError):
    """A line cannot run here; the text says why."""


def compiled_flex(problem: Problem) -> Forward:
    """Compiled FlexAttention with ALiBi as a score function, already compiled for this problem."""
    if problem.backward:
        raise NotAvailable("FlexAttention has no backward on CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Each length is compiled by itself; past dynamo's limit it would silently run uncompiled.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    slopes, n = problem.slopes, problem.length

    def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return value - slopes[h] * (i - j).abs()

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    blocks = create_block_mask(visible, None, None, n, n, device="cpu") if problem.causal else None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = compiled(q, k, v, score_mod=score, block_mask=blocks)
        return output

    try:
        with torch.no_grad():
            forward(*problem.inputs)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        raise NotAvailable(f"{type(error).__name__}: {words[0][:160]}") from error
    return forward


@dataclass(frozen=True)
class Line:
    """One way of computing; `kind` names the bias it must honour (see `Problem.bias_rows`).

    `matrices`: N x N tensors alive at once, forward and with backward. `costs`: times over the
    floor, roughly, for the estimate of the duration alone: (forward, with backward), then causal.
    """

    name: str
    kind: str
    build: Callable[[Problem, dict[str, Any]], Forward]
    matrices: tuple[int, int] = (0, 0)
    costs: tuple[tuple[float, float], tuple[float, float]] = ((1.05, 1.05), (1.1, 1.05))
    backward: bool = True

    def cost(self, problem: Problem) -> float:
        """The expected time over the floor's."""
        return self.costs[problem.causal][problem.backward]


def plain(problem: Problem, shared: dict[str, Any]) -> Forward:
    causal = problem.causal
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def ours(
    make: Callable[[Problem], ab.Bias], lowering: str | None = None
) -> Callable[[Problem, dict[str, Any]], Forward]:
    def build(problem: Problem, shared: dict[str, Any]) -> Forward:
        bias, causal = make(problem), problem.causal
        shared["lowering"] = lowering
        if lowering is None:
            q, k, v = problem.inputs
            shared["lowering"] = str(ab.explain(q, k, v, bias=bias, causal=causal).chosen)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            output = ab.attention(q, k, v, bias=bias, causal=causal, lowering=lowering)
            return cast(Tensor, output)

        return forward

    return build


def alibi(problem: Problem) -> ab.Bias:
    bias: ab.Bias = ab.forms.ALiBi(heads=HEADS)(queries=problem.length, keys=problem.length)
    return bias


def t5(problem: Problem) -> ab.Bias:
    form = ab.forms.T5(
        heads=HEADS,
        buckets=BUCKETS,
        max_distance=MAX_DISTANCE,
        bidirectional=not problem.causal,
        table=problem.table,
    )
    bias: ab.Bias = form(queries=problem.length, keys=problem.length)
    return bias


def dense(problem: Problem, shared: dict[str, Any]) -> Forward:
    mask = shared_mask(problem, shared)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def eager(problem: Problem, shared: dict[str, Any]) -> Forward:
    mask = shared_mask(problem, shared)
    return lambda q, k, v: eager_attention(q, k, v, mask)


def mask_name(problem: Problem) -> tuple[int, str, bool]:
    """What a dense mask depends on."""
    return problem.length, problem.dtype, problem.causal


def shared_mask(problem: Problem, shared: dict[str, Any]) -> Tensor:
    """The dense mask, built once for the lines and directions that use the same one."""
    if shared.get("mask_of") != mask_name(problem):
        shared.clear()
        shared["mask"], shared["mask_of"] = dense_alibi(problem), mask_name(problem)
    return cast(Tensor, shared["mask"])


FLOOR = "plain"
LINES = (
    Line(FLOOR, "none", plain),
    Line("key bias", "key", ours(lambda p: ab.KeyBias(p.key_bias))),
    Line("ALiBi", "alibi", ours(alibi)),
    # With gradients the T5 table runs the same code as ALiBi: left out there for the time it takes.
    Line("T5 table", "t5", ours(t5), backward=False),
    Line("ALiBi, tiled", "alibi", ours(alibi, "tiled"), costs=((1.3, 1.2), (1.35, 1.1))),
    Line(
        "ALiBi, dense mask",
        "alibi",
        dense,
        matrices=(1, 1),
        costs=((1.15, 1.1), (1.9, 1.6)),
    ),
    Line("ALiBi, eager", "alibi", eager, matrices=(3, 4), costs=((3.2, 1.8), (5.0, 2.9))),
    Line(
        "ALiBi, flex",
        "alibi",
        lambda problem, shared: compiled_flex(problem),
        costs=((1.6, 0.0), (1.4, 0.0)),
    ),
)


def lines_of(problem: Problem) -> tuple[Line, ...]:
    """The lines that this group has."""
    return tuple(line for line in LINES if line.backward or not problem.backward)
