"""The oracle of every test: float64, dense, obvious."""

from __future__ import annotations

import torch
from torch import Tensor

from attnbias.lowering.problem import Lowering, Offer, Problem


class Reference(Lowering):
    """``softmax(scale q k^T + B) v`` with every matrix built, in float64. Memory O(queries x
    keys).
    """

    name = "reference"

    def offer(self, problem: Problem) -> Offer:
        entries = problem.batch * problem.heads * problem.queries * problem.keys
        return self.bid(20.0, 3 * 8 * entries, "float64, builds every score")

    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        query, key, value = (t.double() for t in (problem.query, problem.key, problem.value))
        group = problem.heads // max(key.shape[1], 1)
        key, value = (t.repeat_interleave(group, dim=1) for t in (key, value))
        score = problem.scale * (query @ key.mT)
        if problem.bias is not None:
            score = score + problem.bias.dense().to(score)
        seen = (score > -torch.inf).any(-1)
        # A row of nothing but -inf has a NaN softmax and a NaN gradient: here it is 0.
        safe = torch.where(seen[..., None], score, 0.0)
        lse = torch.where(seen, safe.logsumexp(-1), -torch.inf)
        weight = torch.where(seen[..., None], safe.softmax(-1), 0.0)
        kind = problem.query.dtype
        return (weight @ value).to(kind), lse.to(torch.promote_types(kind, torch.float32))
