"""The hook `reallocate`, by a rule of the tests that sets the share of chosen keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tests.cases.rule import RuleCase
from tests.steer.dense import Map, give
from tests.steer.sample_rules import SetShare
from tests.steer.test_key_shift import chosen


class TestSetShare(RuleCase):
    __test__ = True
    zero, small, large = None, 0.5, 0.95

    def rule(self, strength: float | None, **where: Any) -> SetShare:
        return SetShare(keys=["first", range(3, 5)], share=strength, **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        return give(chosen, strength)
