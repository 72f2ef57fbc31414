"""A group of the attention grid: its inputs, its biases, and the float64 answer for sampled rows.

The answer is written out in plain tensor operations and asks nothing of attnbias, so a line that
ignored its bias, or shifted it, would show an error as large as the bias's effect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BATCH, HEADS, DIM = 1, 8, 64
BUCKETS, MAX_DISTANCE = 32, 128
SAMPLED_ROWS = 32
SEED = 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Problem:
    """One cell group: queries, keys, values ~ N(0, 1), and the parameters of every bias.

    key bias ~ N(0, 1), one per head and key; ALiBi with slopes 2^-1 ... 2^-8; T5 table ~ N(0, 1).
    """

    length: int
    dtype: str = "float32"
    causal: bool = False
    backward: bool = False

    @cached_property
    def _draws(self) -> tuple[Tensor, ...]:
        source = torch.Generator().manual_seed(SEED)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source)

        rows = (BATCH, HEADS, self.length, DIM)
        return (
            *(normal(*rows).to(DTYPES[self.dtype]) for _ in range(4)),
            normal(HEADS, self.length),
            normal(BUCKETS, HEADS),
        )

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key, value; leaves that need a gradient when the problem goes backward."""
        q, k, v = (tensor.requires_grad_(self.backward) for tensor in self._draws[:3])
        return q, k, v

    @property
    def grad_output(self) -> Tensor:
        return self._draws[3]

    @property
    def key_bias(self) -> Tensor:
        """(heads, keys), float32."""
        return self._draws[4]

    @property
    def table(self) -> Tensor:
        """T5's table, (buckets, heads), float32."""
        return self._draws[5]

    @cached_property
    def slopes(self) -> Tensor:
        return torch.tensor([2.0 ** -(head + 1) for head in range(HEADS)])

    @cached_property
    def rows(self) -> Tensor:
        """The sampled query rows: the ends, the middle and random ones."""
        n = self.length
        source = torch.Generator().manual_seed(SEED + 1)
        some = torch.randint(0, n, (SAMPLED_ROWS,), generator=source)
        ends = torch.tensor([0, min(1, n - 1), n // 2, n - 1])
        return torch.tensor(sorted(set(torch.cat([ends, some]).tolist())))

    def bias_rows(self, kind: str, rows: Tensor) -> Tensor:
        """The bias of some query rows, float64, (heads, rows, keys); with the causal mask."""
        columns = torch.arange(self.length)
        distance = columns - rows[:, None]
        bias = torch.zeros(HEADS, len(rows), self.length, dtype=torch.float64)
        if kind == "key":
            bias += self.key_bias.double()[:, None, :]
        elif kind == "alibi":
            bias -= self.slopes.double()[:, None, None] * distance.abs()
        elif kind == "t5":
            index = bucket(distance, both=not self.causal)
            bias += self.table.double()[index].permute(2, 0, 1)
        elif kind != "none":
            raise ValueError(f"unknown kind of bias {kind!r}")
        return bias.masked_fill_(distance > 0, -math.inf) if self.causal else bias

    def answer(self, kind: str) -> tuple[Tensor, Tensor]:
        """Output and gradient to the query at the sampled rows, float64, (heads, rows, dim)."""
        q, k, v, g = (tensor.detach()[0].double() for tensor in self._draws[:4])
        q, g = q[:, self.rows], g[:, self.rows]
        scale = DIM**-0.5
        weight = (q @ k.mT * scale + self.bias_rows(kind, self.rows)).softmax(-1)
        output = weight @ v
        # dS = P * (dO V^T - sum(dO * O)), dQ = scale * dS K
        slope = weight * (g @ v.mT - (g * output).sum(-1, keepdim=True))
        return output, scale * slope @ k


def bucket(distance: Tensor, *, both: bool) -> Tensor:
    """T5's bucket of `key - query`: half exact, half logarithmic up to MAX_DISTANCE."""
    count = BUCKETS // 2 if both else BUCKETS
    base = (distance > 0).long() * count if both else torch.zeros_like(distance)
    steps = distance.abs() if both else (-distance).clamp(min=0)
    exact = count // 2
    far = torch.log(steps.clamp(min=1).float() / exact) / math.log(MAX_DISTANCE / exact)
    large = (exact + (far * (count - exact)).long()).clamp(max=count - 1)
    return base + torch.where(steps < exact, steps, large)
