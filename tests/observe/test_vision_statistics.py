"""Statistics of vision models against their dense route, through the inherited case."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from tests.cases.statistic import StatisticCase
from tests.observe.calls import DenseMap

s = ab.statistics


def within(whole: DenseMap, name: str, length: int) -> Tensor:
    """(B, length) bool: the positions inside a span."""
    span: Any = whole.spans[name]
    rows = span if isinstance(span, list) else [span] * len(whole.p)
    at = torch.arange(length)
    return torch.stack([(at >= a) & (at < (length if b is None else b)) for a, b in rows])


class TestGiven(StatisticCase):
    def build(self) -> s.Statistic:
        return s.Given("rest")

    def dense(self, whole: DenseMap) -> Tensor:
        asks = within(whole, "rest", whole.p.shape[2])
        sums = (whole.p.nan_to_num(0.0) * asks[:, None, :, None]).sum(-2)
        share = sums / sums.sum(-1, keepdim=True)
        return share.masked_fill(~whole.has_key, torch.nan)


def test_given_needs_its_span() -> None:
    with pytest.raises(AttnbiasError, match="needs the span class"):
        s.Given("class").check(("image",))
    with pytest.raises(AttnbiasError, match="name of a span"):
        s.Given("")
