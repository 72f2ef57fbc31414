"""Rules that exist for the tests alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.bias import Bias, Dense
from attnbias.steer import Rule, SiteCall
from attnbias.steer.spans import Keys, keys_of


@dataclass(frozen=True, kw_only=True)
class SetShare(Rule):
    """Chosen keys get a given share of the attention that a row's keys get together."""

    keys: Keys
    share: float | None  # None leaves everything as it is

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", keys_of(self.keys))

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(key for key in self.keys if isinstance(key, str))

    def groups(self, site: SiteCall) -> Tensor:
        return site.where(self.keys).long()[:, None]

    def group_count(self, site: SiteCall, groups: Tensor) -> int:
        return 2

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        if self.share is None:
            return masses
        total = masses.sum(-1)
        new = torch.stack([(1 - self.share) * total, self.share * total], -1)
        return torch.where((masses > 0).all(-1, keepdim=True), new, masses)


@dataclass(frozen=True, kw_only=True)
class PerHead(Rule):
    """A dense bias that differs per head and is no key bias: the general path of the engine."""

    strength: float
    seen: ClassVar[list[tuple[int, ...]]] = []

    def bias(self, site: SiteCall) -> Bias | None:
        _, _, queries, keys = site.shape
        self.seen.append(site.heads)
        generator = torch.Generator().manual_seed(queries * 1000 + keys)
        table = torch.randn(1, 64, queries, keys, generator=generator, dtype=torch.float64)
        return Dense(self.strength * table[:, list(site.heads)].to(site.dtype))


@dataclass(frozen=True, kw_only=True)
class Returns(Rule):
    """Gives back from a hook whatever it was told to."""

    bias_value: object = None
    groups_value: object = None
    shares: object = None

    def bias(self, site: SiteCall) -> Bias | None:
        return self.bias_value  # type: ignore[return-value]

    def groups(self, site: SiteCall) -> Tensor:
        if self.groups_value is None:
            return torch.zeros(1, 1, site.shape[3], dtype=torch.long)
        return self.groups_value  # type: ignore[return-value]

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        return self.shares(masses) if callable(self.shares) else None
