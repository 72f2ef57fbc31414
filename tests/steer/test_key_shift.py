from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Range
from tests.cases.rule import RuleCase
from tests.steer.dense import Map, multiply


def chosen(found: Map) -> Tensor:
    return (found.positions == 0) | ((found.positions >= 3) & (found.positions < 5))


class TestKeyShift(RuleCase):
    __test__ = True
    zero, small, large = 0.0, 0.3, 3.0

    def rule(self, strength: float, **where: Any) -> ab.rules.KeyShift:
        return ab.rules.KeyShift(keys=["first", range(3, 5)], amount=strength, **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        return multiply(chosen, float(torch.tensor(strength, dtype=torch.float64).exp()))


def test_factor_is_the_exponential_of_the_amount() -> None:
    rule = ab.rules.KeyShift(keys="first", factor=2.0, heads="all")
    assert rule.strength == pytest.approx(0.6931471805599453, abs=1e-15)


def test_keys_are_kept_as_names_positions_and_ranges() -> None:
    rule = ab.rules.KeyShift(keys=["first", 4, range(2, 6), "question"], amount=1, heads="all")
    assert rule.keys == ("first", 4, Range(2, 6), "question")
    assert rule.needs == ("first", "question")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"keys": "first"}, "either amount"),
        ({"keys": "first", "amount": 1.0, "factor": 2.0}, "either amount"),
        ({"keys": "first", "amount": float("nan")}, "amount must be a finite"),
        ({"keys": "first", "amount": float("-inf")}, "amount must be a finite"),
        ({"keys": "first", "amount": "2"}, "amount must be a finite"),
        ({"keys": "first", "factor": 0.0}, "above 0"),
        ({"keys": "first", "factor": True}, "above 0"),
        ({"keys": [], "amount": 1.0}, "at least one key"),
        ({"keys": [-1], "amount": 1.0}, "token positions from 0"),
        ({"keys": range(5, 5), "amount": 1.0}, "token positions from 0"),
        ({"keys": range(0, 9, 2), "amount": 1.0}, "token positions from 0"),
        ({"keys": 1.5, "amount": 1.0}, "at least one key"),
        ({"keys": 3, "amount": 1.0, "phase": "later"}, "phase must be"),
        ({"keys": 3, "amount": 1.0, "layers": "some"}, "layers must be"),
        ({"keys": 3, "amount": 1.0, "towers": "text"}, "towers must be"),
    ],
)
def test_refused_in_one_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        ab.rules.KeyShift(**({"heads": "all"} | fields))
    assert "\n" not in str(caught.value)
