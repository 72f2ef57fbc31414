"""Every structure in one GPU kernel, forward and backward: see `attnbias.kernels`."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnbias import kernels
from attnbias.lowering import flash
from attnbias.lowering.problem import Lowering, Offer, Problem

INTERPRETED = 1e6  # an interpreted kernel is for tests: never the cheapest
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
WIDEST = 256


class Triton(Lowering):
    """Softmax with every bias that a kernel can make on the way, dropout, and gradients.

    Memory O(queries + keys) beside the parameters of the bias.
    """

    name = "triton"
    drops = True

    def offer(self, problem: Problem) -> Offer:
        query = problem.query
        why = kernels.runs_on(query.device)
        if why:
            return self.refuse(why)
        if query.dtype not in DTYPES:
            return self.refuse(f"the kernels compute no {str(query.dtype).removeprefix('torch.')}")
        if max(query.shape[-1], problem.value.shape[-1]) > WIDEST:
            return self.refuse(f"heads of more than {WIDEST} features do not fit on chip")
        from attnbias.lowering import triton_parts, triton_points

        why = triton_parts.reason(problem.bias)
        if why:
            return self.refuse(why)
        time = INTERPRETED if kernels.interpreted() else 1.0
        offer = self.bid(time, 0, "one kernel, the bias made on chip")
        return dataclasses.replace(offer, error=triton_points.error(problem.bias))

    def answer(self, problem: Problem) -> Offer:
        # Gradients to the bias come out of the same kernels.
        return self.offer(problem) if problem.normaliser == "softmax" else super().answer(problem)

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        if problem.empty:
            return flash.flash(problem.query, problem.key, problem.value, scale=problem.scale)
        parameters = () if problem.bias is None else problem.bias.parameters()
        apply: Any = _Triton.apply
        found: tuple[Tensor, Tensor] = apply(
            problem.query, problem.key, problem.value, problem, *parameters
        )
        return found


class _Triton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, problem: Problem, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        bias = None if problem.bias is None else problem.bias.detach()
        fixed = dataclasses.replace(
            problem, query=query.detach(), key=key.detach(), value=value.detach(), bias=bias
        )
        out, lse = forward(fixed)
        ctx.save_for_backward(query, key, value, out, lse, *parameters)
        nothing = query.new_empty(0)  # they are saved: another reference would be a cycle
        ctx.problem = dataclasses.replace(fixed, query=nothing, key=nothing, value=nothing)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        from attnbias.lowering import triton_gradients

        query, key, value, out, lse, *parameters = ctx.saved_tensors
        problem = dataclasses.replace(ctx.problem, query=query, key=key, value=value)
        wanted = ctx.needs_input_grad
        dq, dk, dv, *rest = triton_gradients.gradients(
            problem, out, lse, grad, grad_lse, wanted[:3], parameters, wanted[4:]
        )
        return dq, dk, dv, None, *rest


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, without gradients."""
    from attnbias.kernels import launch
    from attnbias.lowering import triton_parts

    given = triton_parts.give(problem, problem.bias, parts=True)
    return launch.forward_pass(problem.query, problem.key, problem.value, problem.scale, given)
