"""Attention problems to measure: told in a few words and numbers, drawn by a seed, built again.

What `attnbias bench --calibrate` and the benchmark of the planner have in common.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from attnbias.bias import Bias

DIRECTIONS = ("forward", "training", "learned")
# Structures whose queries and keys are the tokens of one grid.
ON_A_GRID = ("grid", "neighborhood", "swin", "shifted swin", "decomposed")
SIZES = (16, 24, 32, 40, 48, 64, 64, 64, 80, 96, 128)
# Sums that models use, beside single structures.
SUMS = (
    ("alibi", "key"),
    ("table", "padding"),
    ("table", "low-rank"),
    ("window", "key"),
    ("segments", "table"),
    ("segments", "key"),
    ("rbf", "key"),
    ("distance", "table"),
    ("pair", "padding"),
    ("low-rank", "key"),
    ("classes", "table"),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem in words and numbers. Parameters and tensors are drawn from `seed`.

    direction: ``"forward"``; ``"training"``, with gradients to query, key and value;
    ``"learned"``, to what the bias stores, too.
    """

    structures: tuple[str, ...]
    batch: int
    heads: int
    key_heads: int
    queries: int
    keys: int
    size: int
    dtype: str = "float32"
    causal: bool = False
    direction: str = "forward"
    dropout: float = 0.0
    grid: tuple[int, int] = (0, 0)
    seed: int = 0

    @property
    def work(self) -> float:
        """Features of scores: what the time of a forward pass goes with."""
        scores = self.batch * self.heads * self.queries * self.keys
        return scores * (self.size + 12.0) / (2.0 if self.causal else 1.0)

    @staticmethod
    def of(given: dict[str, Any]) -> Case:
        """From `dataclasses.asdict`, through JSON."""
        made = {**given, "structures": tuple(given["structures"]), "grid": tuple(given["grid"])}
        return Case(**made)

    def build(
        self, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None]:
        """Query, key, value and bias, with gradients asked for as the direction says."""
        import torch

        draw = _Draw(self, device)
        kind = getattr(torch, self.dtype)
        shapes = [
            (self.batch, heads, length, self.size)
            for heads, length in (
                (self.heads, self.queries),
                (self.key_heads, self.keys),
                (self.key_heads, self.keys),
            )
        ]
        made = [draw.normal(*shape).to(kind) for shape in shapes]
        bias: Bias | None = None
        for name in self.structures:
            part = STRUCTURES[name](draw)
            bias = part if bias is None else bias + part
        if self.direction != "forward":
            for tensor in made:
                tensor.requires_grad_()
        if self.direction == "learned" and bias is not None:
            leaves = [p.detach().clone() for p in bias.parameters()]
            bias = bias.with_parameters([p.requires_grad_(p.is_floating_point()) for p in leaves])
        query, key, value = made
        return query, key, value, bias


class _Draw:
    """Random parameters for a case, on the device asked for, the same on all."""

    def __init__(self, case: Case, device: torch.device) -> None:
        import torch

        self.case, self.device = case, device
        self.source = torch.Generator().manual_seed(case.seed)
        self.heads, self.n, self.m = case.heads, case.queries, case.keys

    def normal(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.randn(*shape, generator=self.source).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        import torch

        return torch.rand(*shape, generator=self.source).to(self.device)

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        import torch

        return torch.randint(0, high, shape, generator=self.source).to(self.device)


def _alibi(d: _Draw) -> Bias:
    import attnbias as ab

    bias: Bias = ab.forms.ALiBi(heads=d.heads)(d.n, d.m, device=d.device)
    return bias


def _table(d: _Draw) -> Bias:
    import attnbias as ab

    return ab.Relative(d.normal(d.heads, d.n + d.m - 1), queries=d.n, keys=d.m)


def _low_rank(d: _Draw) -> Bias:
    import attnbias as ab

    rank = (1, 2, 4, 8, 8, 16)[int(d.integers(6, 1))]
    u, v = (d.normal(d.heads, length, rank) * rank**-0.25 for length in (d.n, d.m))
    return ab.LowRank(u, v)


def _points(kind: str) -> Callable[[_Draw], Bias]:
    def make(d: _Draw) -> Bias:
        import attnbias as ab

        a, b = d.normal(d.heads, 5), 0.5 + 30 * d.uniform(d.heads, 5)
        slope = -1 - 4 * d.uniform(d.heads)
        radial: dict[str, Callable[[], ab.radial.RadialFunction]] = {
            "scalar": lambda: ab.radial.Scalar(slope),
            "squared": lambda: ab.radial.Squared(slope),
            "rbf": lambda: ab.radial.RBF(a, b),
            "exponential": lambda: ab.radial.Exponential(a, b),
        }
        return ab.Distance(d.uniform(d.n, 2), d.uniform(d.m, 2), radial[kind]())

    return make


def _classes(d: _Draw) -> Bias:
    import attnbias as ab

    rows, cols = d.integers(16, 1, 1, d.n), d.integers(16, 1, 1, d.m)
    return ab.Bucketed(d.normal(1, d.heads, 16, 16), rows, cols)


def _dense(heads: bool) -> Callable[[_Draw], Bias]:
    def make(d: _Draw) -> Bias:
        import attnbias as ab

        return ab.Dense(d.normal(1, d.heads if heads else 1, d.n, d.m))

    return make


def _shaw(d: _Draw) -> Bias:
    import attnbias as ab

    size = d.case.size
    embedding = d.normal(d.heads, 33, size) * size**-0.5
    bias: Bias = ab.forms.Shaw(d.heads, size, embedding=embedding)(d.n, d.m)
    return bias


def _window(d: _Draw) -> Bias:
    import attnbias as ab

    reach = max(1, d.m // (4, 8, 16)[int(d.integers(3, 1))])
    after = 0 if d.case.causal else reach
    return ab.Window(reach, after, queries=d.n, keys=d.m, device=d.device)


def _segments(d: _Draw) -> Bias:
    """Packed sequences: a few ranges, of unlike lengths; queries are the last of the keys."""
    import torch

    import attnbias as ab

    parts = 2 + int(d.integers(7, 1))
    cuts = (d.uniform(d.m) < parts / d.m).cumsum(0)
    ids = cuts if d.n <= d.m else torch.cat([cuts.new_zeros(d.n - d.m), cuts])
    return ab.Segments(ids[-d.n :], cuts)


def _padding(d: _Draw) -> Bias:
    import torch

    import attnbias as ab

    real = (d.m * (0.5 + 0.5 * d.uniform(d.case.batch, 1))).long().clamp(min=1)
    return ab.Padding(torch.arange(d.m, device=d.device) < real)


def _grid(d: _Draw) -> Bias:
    import attnbias as ab

    rows, cols = d.case.grid
    return ab.GridRelative(d.normal(d.heads, 2 * rows - 1, 2 * cols - 1), (rows, cols))


def _shifted(d: _Draw) -> Bias:
    """Windows of a shifted image: a quarter of them see parts of themselves."""
    import torch

    import attnbias as ab

    rows, cols = d.case.grid
    down, over = torch.arange(rows) * 2 >= rows, torch.arange(cols) * 2 >= cols
    ids = torch.zeros(d.case.batch, rows, cols, dtype=torch.int64)
    ids[::4] = (2 * down[:, None] + over).long()
    ids = ids.flatten(1).to(d.device)
    return _grid(d) + ab.Segments(ids, ids)


def _neighborhood(d: _Draw) -> Bias:
    import attnbias as ab

    size = [min(13, side) for side in d.case.grid]
    bias: Bias = ab.Neighborhood(d.case.grid, size, device=d.device)
    return bias


def _decomposed(d: _Draw) -> Bias:
    import attnbias as ab

    size = d.case.size
    vectors = [d.normal(side, side, size) * size**-0.5 for side in d.case.grid]
    return ab.Decomposed(vectors)


def _key(d: _Draw) -> Bias:
    import attnbias as ab

    return ab.KeyBias(d.normal(d.heads, d.m))


STRUCTURES: dict[str, Callable[[_Draw], Bias]] = {
    "key": _key,
    "padding": _padding,
    "alibi": _alibi,
    "table": _table,
    "window": _window,
    "segments": _segments,
    "low-rank": _low_rank,
    "squared": _points("squared"),
    "distance": _points("scalar"),
    "rbf": _points("rbf"),
    "exponential": _points("exponential"),
    "classes": _classes,
    "pair": _dense(heads=True),
    "shared pair": _dense(heads=False),
    "shaw": _shaw,
    "grid": _grid,
    "neighborhood": _neighborhood,
    "swin": _grid,
    "shifted swin": _shifted,
    "decomposed": _decomposed,
}
# Nothing in them takes a gradient.
FIXED = ("padding", "alibi", "window", "segments", "neighborhood")


def draw(
    source: random.Random,
    structures: Sequence[str],
    direction: str = "forward",
    dtype: str = "float32",
    *,
    most: float = 5e9,
    least: float = 1e5,
    dropout: float = 0.0,
) -> Case:
    """A case with these structures; sizes are drawn, log-uniform, so that its work is in range.

    Three of five problems have as many keys as queries, one of five other lengths, one of five few
    queries (decoding). A quarter has fewer key heads than heads.
    """
    structures = tuple(structures)
    while True:
        size, heads = source.choice(SIZES), source.choice((1, 2, 4, 6, 8, 12, 16))
        batch = source.choice((1, 1, 1, 2, 4, 8))
        key_heads = source.choice([g for g in range(1, heads + 1) if heads % g == 0])
        key_heads = key_heads if source.random() < 0.25 else heads
        causal = source.random() < 0.4
        grid = (0, 0)
        if any(name in ("swin", "shifted swin") for name in structures):
            side = source.choice((7, 8, 12))
            grid, causal, batch = (side, side), False, source.choice((16, 64, 128, 256))
        elif any(name in ON_A_GRID for name in structures):
            grid, causal = (_length(source, 8, 64), _length(source, 8, 64)), False
        queries = keys = grid[0] * grid[1]
        if not queries:
            queries = keys = _length(source, 16, 4096)
            way = source.random()
            if way < 0.2:
                queries = source.randint(1, 16)
            elif way < 0.4:
                queries = _length(source, 16, 4096)
        if causal or "segments" in structures:
            queries = min(queries, keys)  # more would see nothing
        found = Case(
            structures,
            batch,
            heads,
            key_heads,
            queries,
            keys,
            size,
            dtype,
            causal,
            direction,
            dropout,
            grid,
            source.randrange(2**31),
        )
        heavy = most / (1.0 if direction == "forward" else 3.0)
        if least <= found.work <= heavy and _dense_fits(found):
            return found


def _dense_fits(case: Case) -> bool:
    stored = {"pair": case.heads, "shared pair": 1}
    heads = max((stored.get(name, 0) for name in case.structures), default=0)
    return heads * case.queries * case.keys <= 2**25


def _length(source: random.Random, low: int, high: int) -> int:
    return round(math.exp(source.uniform(math.log(low), math.log(high))))
