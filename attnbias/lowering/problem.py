"""A `Problem`, its normal form, and what a lowering answers to it."""

from __future__ import annotations

import dataclasses
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.bias import Bias, KeyBias, Padding, Relative, Window, add
from attnbias.bias.base import to_mask
from attnbias.bias.masks import meet


@dataclass(frozen=True)
class Problem:
    """One attention to compute: ``softmax(scale q k^T + bias) v`` and its log-sum-exp.

    Shapes: query ``(batch, heads, queries, size)``, key ``(batch, key heads, keys, size)``, value
    ``(batch, key heads, keys, value size)``. A causal problem carries its mask in `bias`.

    normaliser: a name of `attnbias.lowering.normaliser.NORMALISERS`. dropout: the probability with
    which a weight is dropped; `seed` names the pattern (see `attnbias.lowering.dropout`).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Bias | None
    scale: float
    normaliser: str = "softmax"
    dropout: float = 0.0
    seed: int = 0

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def empty(self) -> bool:
        return self.query.numel() == 0 or self.keys == 0

    @property
    def gradient(self) -> bool:
        """Whether a gradient to query, key or value is wanted."""
        given = (self.query, self.key, self.value)
        return torch.is_grad_enabled() and any(t.requires_grad for t in given)

    @property
    def bias_gradient(self) -> bool:
        """Whether a gradient to the stored parameters of the bias is wanted."""
        return torch.is_grad_enabled() and self.bias is not None and self.bias.requires_grad

    @functools.cached_property
    def normal(self) -> Normal:
        return Normal.of(self)


@dataclass(frozen=True)
class Normal:
    """A bias sorted by what a lowering can do with it.

    key: ``(batch | 1, heads | 1, keys)`` float, the key biases and paddings together, or None.
    table: ``(batch | 1, heads | 1, queries + keys - 1)``, the relative biases together, or None.
    low, high: the band of the windows, visible where ``low <= j - i <= high``; None is unlimited.
    rest: everything else.
    """

    key: Tensor | None
    table: Tensor | None
    low: int | None
    high: int | None
    rest: tuple[Bias, ...]

    @staticmethod
    def of(problem: Problem) -> Normal:
        terms = [] if problem.bias is None else problem.bias.terms()
        low: int | None = None
        high: int | None = None
        keys: list[Bias] = []
        tables: list[Tensor] = []
        rest: list[Bias] = []
        for term in terms:
            if isinstance(term, Window):
                low, high = meet((low, high), term.band())
            elif isinstance(term, KeyBias):
                keys.append(term)
            elif isinstance(term, Padding):
                keys.append(KeyBias(to_mask(term.keep)[:, None]))
            elif isinstance(term, Relative):
                tables.append(term.table)
            else:
                rest.append(term)
        key = add(*keys) if keys else None
        # A band that hides nothing is no band.
        if low is not None and low <= 1 - problem.queries:
            low = None
        if high is not None and high >= problem.keys - 1:
            high = None
        return Normal(
            key=key.dense()[:, :, 0] if key is not None else None,
            table=functools.reduce(torch.add, tables) if tables else None,
            low=low,
            high=high,
            rest=tuple(rest),
        )

    @property
    def band(self) -> bool:
        return self.low is not None or self.high is not None


@dataclass(frozen=True)
class Offer:
    """What a lowering answers: an offer with its price, or a refusal with its reason.

    time: estimated time over the same attention without a bias. seconds: estimated by the table of
    measured costs (`attnbias.lowering.costs`; 0: `time` is the lowering's own price). memory: extra
    bytes over unbiased attention. error: bound on the error of a score beyond the rounding of the
    format (0: exact).
    passes, read, written, operations: how often the scores are gone through, bytes moved, and
    operations, filled in by `explain` (`attnbias.lowering.traffic`; 0: not known).
    """

    lowering: str
    time: float = float("inf")
    memory: int = 0
    error: float = 0.0
    reason: str = ""
    passes: int = 0
    read: int = 0
    written: int = 0
    operations: int = 0
    seconds: float = 0.0

    @property
    def refused(self) -> bool:
        return self.time == float("inf")


def learned(forward: float, dtype: torch.dtype) -> float:
    """Time of both passes with gradients to the bias, where the forward takes `forward`.

    The backward by tiles (`attnbias.lowering.backward`) is 0.72 of both passes without a bias; it
    takes 1.2 of the fused one, 1.8 in the half formats, which it computes in float32.
    """
    half = dtype in (torch.float16, torch.bfloat16)
    return round(0.28 * forward + 0.72 * (1.8 if half else 1.2), 3)


def tile_cost(problem: Problem) -> float:
    """Time that tiles add to that of a score without a bias: the passes over them, and entries.

    A score of size d takes as long as d + 12 features; a pass over a tile as 8.
    """
    entry = 0.0 if problem.bias is None else problem.bias.entry_cost
    return (8.0 + entry) / (problem.query.shape[-1] + 12.0)


class Lowering(ABC):
    """One way to compute a problem.

    The planner refuses in its name a normaliser that is not in `normalisers`, and dropout unless
    `drops`.
    """

    name: str
    normalisers: frozenset[str] = frozenset({"softmax"})
    drops: bool = False

    def answer(self, problem: Problem) -> Offer:
        """`offer`, after what every lowering must refuse alike."""
        if problem.normaliser not in self.normalisers:
            return self.refuse(f"computes no {problem.normaliser} weights")
        if problem.dropout and not self.drops:
            return self.refuse("drops no weights")
        offer = self.offer(problem)
        if problem.bias_gradient and not offer.refused:
            return dataclasses.replace(offer, time=learned(offer.time, problem.query.dtype))
        return offer

    @abstractmethod
    def offer(self, problem: Problem) -> Offer:
        """A price, or a refusal. Looks at shapes, structure and dtypes only; computes nothing
        large. The time is that of the forward pass: `answer` adds a backward with gradients to the
        bias, which is the same for all.
        """

    @abstractmethod
    def run(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """``(output, lse)``; the output in the dtype of the query, rows without a key 0 and
        -inf.
        """

    def refuse(self, reason: str) -> Offer:
        return Offer(self.name, reason=reason)

    def bid(self, time: float, memory: int = 0, reason: str = "") -> Offer:
        return Offer(self.name, time=time, memory=memory, reason=reason)
