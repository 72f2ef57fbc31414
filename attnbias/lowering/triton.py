"""Every structure in one GPU kernel, forward and backward: see `attnbias.kernels`."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbias import kernels
from attnbias.lowering import backward, flash
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
        from attnbias.lowering import triton_parts

        why = triton_parts.reason(problem.bias)
        if why:
            return self.refuse(why)
        time = INTERPRETED if kernels.interpreted() else 1.0
        return self.bid(time, 0, "one kernel, the bias made on chip")

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        if problem.empty or problem.value.shape[-1] == 0:
            return flash.flash(problem.query, problem.key, problem.value, scale=problem.scale)
        return backward.learned(problem, forward)


def forward(problem: Problem) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, without gradients."""
    from attnbias.kernels import launch
    from attnbias.lowering import triton_parts

    given = triton_parts.give(problem, problem.bias)
    return launch.forward_pass(problem.query, problem.key, problem.value, problem.scale, given)
