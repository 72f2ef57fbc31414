"""Any bias in one compiled loop, forward and backward: products and exponentials of a tile while it
is in the cache, the bias added on the way.

Windows, paddings and packed segments are ranges of keys that are never looked at outside; a table,
a row of keys and a matrix are read where they lie; a `LowRank` lies beside queries and keys. The
entries of every other structure are built in strips of rows that stay in the cache, and the
gradient of the scores comes back in such strips.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbias.lowering import flash, own_parts, own_passes, packed
from attnbias.lowering.own_ready import Ready
from attnbias.lowering.problem import Lowering, Offer, Problem, tile_cost
from attnbias.lowering.total import Total
from attnbias.native import available

SHORTEST = 64  # queries: below, making panels of the keys costs as much as using them
START = 2e-4 / 2e-11  # seconds of a call, in features of scores (see `tile_cost`), on two cores


class Own(Lowering):
    """Softmax with every bias, dropout and gradients. Memory O(queries + keys), and strips of
    entries where a structure needs them built. In float32 whatever the format.
    """

    name = "own"
    drops = True

    def offer(self, problem: Problem) -> Offer:
        query = problem.query
        if not available() or query.device.type not in ("cpu", "meta"):
            return self.refuse("the compiled loops are not there")
        if query.dtype == torch.float64:
            return self.refuse("the compiled loops are for float32")
        if problem.bias is None and not problem.dropout:
            return self.refuse("there is no bias and no dropout")
        if problem.queries < SHORTEST:
            return self.refuse(f"fewer than {SHORTEST} queries do not pay for panels of keys")
        terms = [] if problem.bias is None else problem.bias.terms()
        built = any(not own_parts.direct(t) for t in terms)
        time = 0.8 + tile_cost(problem) if built else 0.55
        if torch.backends.cpu.get_cpu_capability() != "AVX512":
            time += 0.5  # PyTorch's own products are as wide as these
        work = problem.batch * problem.heads * problem.queries * problem.keys
        if not problem.empty:
            time = time * _share(problem) + START / (work * (query.shape[-1] + 12.0))
        rows = problem.batch * problem.heads * (problem.queries + problem.keys)
        memory = 4 * rows * query.shape[-1] + 4 * own_parts.ENTRIES * built
        return self.bid(round(time, 3), memory, "one compiled loop over blocks of queries")

    def answer(self, problem: Problem) -> Offer:
        # Gradients to the bias come out of the same loop.
        return self.offer(problem) if problem.normaliser == "softmax" else super().answer(problem)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        if problem.empty or problem.value.shape[-1] == 0:
            return flash.flash(problem.query, problem.key, problem.value, scale=problem.scale)
        parameters = () if problem.bias is None else problem.bias.parameters()
        apply: Any = _Own.apply
        found: tuple[Tensor, Tensor] = apply(
            problem.query, problem.key, problem.value, problem, *parameters
        )
        return found


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, problem: Problem, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        bias = None if problem.bias is None else problem.bias.detach()
        out, lse = own_passes.forward(Ready(problem, bias, query, key, value))
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *parameters)
        nothing = query.new_empty(0)  # they are saved: another reference would be a cycle
        ctx.problem = dataclasses.replace(
            problem, query=nothing, key=nothing, value=nothing, bias=bias
        )
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, *parameters = ctx.saved_tensors
        problem = ctx.problem
        total = Total(problem.bias, parameters, ctx.needs_input_grad[4:])
        bias = None if total.bias is None else total.bias.detach()
        ready = Ready(problem, bias, query, key, value)
        dq, dk, dv = own_passes.backward(ready, out, lse, grad, grad_lse, total)
        wanted = ctx.needs_input_grad
        given = [t if w else None for t, w in zip((dq, dk, dv), wanted[:3], strict=True)]
        return (*given, None, *total.results())


def _share(problem: Problem) -> float:
    """Pairs that packed segments leave to be seen."""
    segments, _ = packed.split(problem)
    if len(segments) != 1 or segments[0].query_ids.is_meta or segments[0].key_ids.is_meta:
        return 1.0
    parts = packed.ranges(problem)
    if parts is None:
        return 1.0
    return packed.pairs(parts) / (problem.batch * problem.queries * problem.keys)
