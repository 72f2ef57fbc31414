from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Range
from tests.cases.rule import RuleCase
from tests.steer.dense import Map
from tests.steer.models import make

WINDOW, START = 3, 2


class TestLocoRE(RuleCase):
    __test__ = True
    zero, small, large = 0.0, 0.15, 9.0

    def rule(self, strength: float, **where: Any) -> ab.rules.LocoRE:
        written = (Range(START, None),)
        return ab.rules.LocoRE(beta=strength, window=WINDOW, written=written, **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        """Multiply the weights of the last few written tokens, and normalise."""

        def rewrite(found: Map) -> Tensor:
            p = found.probabilities
            query, key = torch.arange(p.shape[2])[None], found.positions
            if found.decoding:
                query = key.amax(-1, keepdim=True)
            elif p.shape[2] == p.shape[3]:
                query = key
            near = (query[:, :, None] - key[:, None]).clamp(min=0)
            near = (
                (near >= 1) & (near <= WINDOW) & (key >= START)[:, None] & (query >= 0)[..., None]
            )
            weights = p * torch.where(near[:, None], 1 + strength, 1.0)
            sums = weights.sum(-1, keepdim=True) + found.rest
            return torch.where(sums > 0, weights / sums, p)

        return rewrite


@torch.no_grad()
def test_rows_have_their_own_prompts(request: pytest.FixtureRequest) -> None:
    """Each row counts from its own first written token; a row without any is plain."""
    subject = make("mistral", request)
    rule = ab.rules.LocoRE(beta=3.0, heads="all")
    plain = subject.run()
    with ab.steer(subject.model, rule, spans={"generated": [(4, None), (9, None)]}):
        found = subject.run()
    for row, start in enumerate((4, 9)):
        alone = {"input_ids": subject.inputs["input_ids"][row : row + 1]}
        with ab.steer(subject.model, rule, spans={"generated": (start, None)}):
            single = subject.model(**alone).logits
        torch.testing.assert_close(found[row : row + 1], single, atol=1e-5, rtol=1e-4)
        # The first written token is seen as written only by those after it.
        assert torch.equal(found[row, : start + 1], plain[row, : start + 1])
        assert not torch.equal(found[row, start + 1], plain[row, start + 1])


@torch.no_grad()
def test_needs_the_written_tokens(request: pytest.FixtureRequest) -> None:
    subject = make("mistral", request)
    rule = ab.rules.LocoRE(heads="all")
    with (
        pytest.raises(ab.AttnbiasError, match="needs the span 'generated'"),
        ab.steer(subject.model, rule),
    ):
        pass


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"beta": -0.1}, "beta must be a finite number from 0"),
        ({"beta": float("nan")}, "beta must be"),
        ({"window": 0}, "window must be a whole number above 0"),
        ({"window": 2.0}, "window must be"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words):
        ab.rules.LocoRE(heads="all", **fields)
