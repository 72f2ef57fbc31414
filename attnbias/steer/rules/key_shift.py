"""A log-bias on chosen keys: the plainest shift of attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from attnbias.bias import Bias, KeyBias
from attnbias.errors import AttnbiasError
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of


@dataclass(frozen=True, kw_only=True)
class KeyShift(Rule):
    r"""Multiply the attention on chosen keys by a factor, then normalise each row again.

    .. math:: p'_{ij} = \frac{f^{[j \in K]}\, p_{ij}}{\sum_l f^{[l \in K]}\, p_{il}}
              \quad\text{that is}\quad B_{ij} = a\,[j \in K],\ a = \log f

    Args:
        keys: the set K: absolute token positions (0 is the first real token of a row), ``range``
            objects, names of spans, ``"first"``, or a list of these.
        amount: a, in natural-log units; 0 changes nothing.
        factor: f > 0, instead of `amount`.
        heads, layers, towers, phase: see `Rule`.

    Cost: the attention of the chosen heads once more where rows are left alone; memory O(keys).

    Raises:
        AttnbiasError: both or neither of amount and factor, a number that is not finite (to hide
            keys, write a large negative amount such as -30).

    Source: the additive form of post-hoc attention steering (PASTA, 2023, arXiv 2311.02262), here
    on any keys and in either direction.
    """

    layers_alike: ClassVar[bool] = True
    keys: Keys
    amount: float | None = None
    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", keys_of(self.keys))
        if (self.amount is None) == (self.factor is None):
            raise AttnbiasError("KeyShift takes either amount (natural log) or factor, not both.")
        if self.amount is not None and not _finite(self.amount):
            raise AttnbiasError(f"amount must be a finite number, got {self.amount!r}.")
        if self.factor is not None and not (_finite(self.factor) and self.factor > 0):
            raise AttnbiasError(f"factor must be a finite number above 0, got {self.factor!r}.")

    @property
    def strength(self) -> float:
        """The log-bias in natural-log units."""
        if self.amount is not None:
            return float(self.amount)
        assert self.factor is not None
        return math.log(self.factor)

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.keys if isinstance(key, str))

    def bias(self, site: SiteCall) -> Bias | None:
        if self.strength == 0:
            return None
        chosen = site.where(self.keys)
        weight = torch.zeros(chosen.shape, dtype=site.dtype, device=chosen.device)
        return KeyBias(weight.masked_fill(chosen, self.strength)[:, None])


def _finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]
