from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RuleCase
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import Subject, stories, tokens

Example = ab.rules.Example


class TestZeroTuning(RuleCase):
    __test__ = True
    zero, small, large = 1.0, 0.7, 8.0

    def rule(self, strength: float, **where: Any) -> ab.rules.ZeroTuning:
        return ab.rules.ZeroTuning(factor=strength, **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        """The published form: scale the weight of token 0 and divide by D."""

        def rewrite(found: Map) -> Tensor:
            p = found.probabilities
            first = (found.positions == 0)[:, None, None, :]
            divisor = 1 + (strength - 1) * (p * first).sum(-1, keepdim=True)
            return torch.where(first, strength * p, p) / divisor

        return rewrite


def test_unfitted_is_refused_with_the_line_to_run(stories: Path) -> None:
    subject = stories_subject(stories)
    rule = ab.rules.ZeroTuning(heads="all")
    with pytest.raises(ab.Refused, match=r"\.fit\(model, examples\)"), ab.steer(
        subject.model, rule
    ):
        pass
    with pytest.raises(ab.Refused, match=r"\.fit\(model, examples\)"):
        ab.Recipe((rule,), "model")


@pytest.mark.parametrize("factor", [0, -1.0, float("inf"), float("nan"), True, "2"])
def test_bad_factors(factor: Any) -> None:
    with pytest.raises(ab.AttnbiasError, match="above 0"):
        ab.rules.ZeroTuning(factor=factor, heads="all")


def stories_subject(folder: Path) -> Subject:
    subject = stories_of(folder)
    subject.inputs = {"input_ids": subject.inputs["input_ids"][:1]}
    return subject


stories_of = stories
