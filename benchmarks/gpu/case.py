"""One problem of the suite: its sizes, its tensors, and what it must cost at least."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.lowering.traffic import visible

SEED = 70
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
ROWS, BATCHES = 16, 2  # sampled queries and batch elements

Parameters = Mapping[str, Tensor]
# score, batch, head, query, key -> score, as FlexAttention calls it
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """A structure: how it is drawn, built, written out, and what it costs.

    Attributes:
        name: for people and keys of results.
        draw: its parameters, on the device, float32 or integers.
        make: the bias of the library on such parameters.
        rows: its entries ``(batch | 1, heads | 1, rows, keys)`` for the sampled rows in the dtype
            of the parameters, written out and asking nothing of attnbias.
        score: the same as a score function of FlexAttention, or None.
        learned: parameters that get gradients where the case trains.
        columns: columns of factors that products gain. stored: numbers that the bias needs for
            each query and key and unit: R of the goal O(N (R + 1)) for memory.
        exps, ops: exponentials and other operations that an entry takes.
    """

    name: str
    draw: Callable[[Case], dict[str, Tensor]]
    make: Callable[[Case, Parameters], ab.Bias]
    rows: Callable[[Case, Parameters, Picked], Tensor]
    score: Callable[[Case, Parameters], Score] | None = None
    learned: tuple[str, ...] = ()
    columns: int = 0
    stored: int = 1
    exps: int = 0
    ops: int = 1


@dataclass(frozen=True)
class Picked:
    """The batch elements and rows that are checked against float64."""

    batches: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Case:
    """One problem. keys, groups: 0 for as many as queries and heads.

    training: gradients to query, key, value and what the kind learns. flex, dense: whether these
    rivals take part (FlexAttention compiles each case anew; a dense matrix may be absurd). more:
    what the kind needs to know besides. label: said after the kind's name.
    """

    script: str
    kind: Kind
    device: str
    batch: int
    heads: int
    queries: int
    size: int
    keys: int = 0
    groups: int = 0
    dtype: str = "bfloat16"
    causal: bool = False
    training: bool = True
    flex: bool = True
    dense: bool = True
    label: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        length = str(self.queries) if self.m == self.queries else f"{self.queries}x{self.m}"
        label = f", {self.label}" if self.label else ""
        return f"{self.kind.name}{label}/{self.dtype}/d{self.size}/{length}"

    @property
    def m(self) -> int:
        return self.keys or self.queries

    @property
    def key_heads(self) -> int:
        return self.groups or self.heads

    @property
    def units(self) -> int:
        return self.batch * self.heads

    @property
    def pairs(self) -> int:
        """Scores that are seen, of all units."""
        high = self.m - self.queries if self.causal else None
        return self.units * visible(self.queries, self.m, None, high)

    def draw(self, what: str) -> torch.Generator:
        """A source of numbers of its own for each tensor, whatever else is drawn."""
        return torch.Generator(self.device).manual_seed(zlib.crc32(f"{SEED}/{what}".encode()))

    def normal(self, what: str, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.draw(what), device=self.device)

    def uniform(self, what: str, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.draw(what), device=self.device)

    def integers(self, what: str, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.draw(what), device=self.device)

    def steps(self) -> Tensor:
        """``j - i`` of all diagonals, from the lowest: ``queries + keys - 1`` of them."""
        return torch.arange(1 - self.queries, self.m, device=self.device)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key, value and the gradient that arrives at the output, N(0, 1)."""
        q = (self.batch, self.heads, self.queries, self.size)
        k = (self.batch, self.key_heads, self.m, self.size)
        kind = DTYPES[self.dtype]
        shapes = {"query": q, "key": k, "value": k, "gradient": q}
        found = [self.normal(name, *shape).to(kind) for name, shape in shapes.items()]
        return found[0], found[1], found[2], found[3]

    @cached_property
    def picked(self) -> Picked:
        """The ends, the middle and random rows of the first, the last and random elements."""
        return Picked(self._some(self.batch, BATCHES), self._some(self.queries, ROWS))

    def _some(self, count: int, wanted: int) -> Tensor:
        ends = torch.tensor([0, count - 1], device=self.device)
        more = self.integers(f"picked of {count}", count, max(wanted - 2, 0))
        every: Any = torch.cat([ends, more])
        found: Tensor = every.unique()
        return found

    def describe(self) -> dict[str, Any]:
        return {
            "kind": self.kind.name,
            "label": self.label,
            "batch": self.batch,
            "heads": self.heads,
            "key_heads": self.key_heads,
            "queries": self.queries,
            "keys": self.m,
            "size": self.size,
            "dtype": self.dtype,
            "causal": self.causal,
            "training": self.training,
            "learned": list(self.kind.learned),
            "rows_for_memory": self.units * (self.queries + self.m) * (self.kind.stored + 1),
        }


def counts(
    case: Case, parameters: Parameters, *, biased: bool = True
) -> dict[str, dict[str, float]]:
    """What each pass needs at least: ``tensor`` operations of products, ``exp2``, ``fma`` (other
    operations on scores), and ``copy`` (bytes of inputs, outputs and parameters, each once).

    The backward makes the scores again: five products where the forward has two. Not `biased`: what
    the same attention needs without the bias, `parameters` then empty.
    """
    kind, pairs, size = case.kind, case.pairs, case.size
    wide = DTYPES[case.dtype].itemsize
    queries = case.units * case.queries * size * wide
    keys = 2 * case.batch * case.key_heads * case.m * size * wide
    lse = 4 * case.units * case.queries
    own = sum(tensor.numel() * tensor.element_size() for tensor in parameters.values())
    slopes = sum(parameters[name].numel() * 4 for name in kind.learned if name in parameters)
    columns, exps, ops = (kind.columns, kind.exps, kind.ops) if biased else (0, 0, 0)
    forward = {
        "tensor": 2.0 * pairs * (2 * size + columns),
        "exp2": float(pairs * (1 + exps)),
        "fma": float(pairs * (4 + ops)),
        "copy": float(2 * queries + keys + lse + own),
    }
    backward = {
        "tensor": 2.0 * pairs * (5 * size + 3 * columns),
        "exp2": float(pairs * (1 + exps)),
        "fma": float(pairs * (6 + 2 * ops)),
        "copy": float(4 * queries + 2 * keys + lse + own + slopes),
    }
    return {"forward": forward, "backward": backward}


def floors(needs: Mapping[str, float], ceilings: Mapping[str, float], dtype: str) -> dict[str, Any]:
    """Seconds that each resource needs at the card's measured rate; the largest is the floor."""
    tensor = ceilings.get(dtype, 0.0)
    if dtype == "float32":  # products of three tf32 parts, or without tensor cores
        tensor = max(ceilings.get("tf32", 0.0) / 3, tensor)
    rates = {**ceilings, "tensor": tensor}
    found = {name: need / rates[name] for name, need in needs.items() if rates.get(name)}
    bound = max(found, key=lambda name: found[name]) if found else ""
    seconds = {name: float(f"{value:.4g}") for name, value in found.items()}
    return {"seconds": seconds, "bound": bound, "floor_s": seconds.get(bound, 0.0)}
