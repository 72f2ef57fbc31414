from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RuleCase, Watch
from tests.steer.dense import Map
from tests.steer.models import make, tokens
from tests.steer.test_key_shift import chosen


class TestSplitSoftmax(RuleCase):
    __test__ = True
    zero, small, large = 1.0, 0.7, 0.1

    def rule(self, strength: float, **where: Any) -> ab.rules.SplitSoftmax:
        fields = {"keys": ["first", range(3, 5)], "phase": "both"} | where
        return ab.rules.SplitSoftmax(power=strength, **fields)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        """The two factors of the paper, on shares of what the keys get together."""

        def rewrite(found: Map) -> Tensor:
            keys = chosen(found)[:, None, None, :]
            p = found.probabilities
            shown = p.sum(-1, keepdim=True)
            pi = (p * keys).sum(-1, keepdim=True) / torch.where(shown > 0, shown, 1.0)
            some = (pi * shown > 1e-30) & ((1 - pi) > 1e-15)
            pi = torch.where(some, pi, 0.5)
            inner, outer = pi**strength / pi, (1 - pi**strength) / (1 - pi)
            return torch.where(some, torch.where(keys, inner, outer) * p, p)

        return rewrite


@pytest.mark.parametrize("power", [0, -0.5, 1.5, True, "0.5", float("nan")])
def test_bad_powers(power: Any) -> None:
    with pytest.raises(ab.AttnbiasError, match=r"power must be above 0 and at most 1, got"):
        ab.rules.SplitSoftmax(power=power, heads="all")


def test_as_published_it_is_for_generation_and_for_the_system_prompt() -> None:
    rule = ab.rules.SplitSoftmax(power=0.5, heads="all")
    assert (rule.phase, rule.keys, rule.needs) == ("decode", ("system",), ("system",))


def masses(*inside: float) -> Tensor:
    found = torch.tensor(inside, dtype=torch.float64)
    return torch.stack([1 - found, found], -1)[None, None]


def test_shares_are_powers_and_whole_rows_stay() -> None:
    rule = ab.rules.SplitSoftmax(power=0.25, heads="all")
    old = masses(0.0, 1e-12, 0.3, 0.81, 1 - 1e-12, 1.0)
    new = rule.reallocate(None, old)  # type: ignore[arg-type]
    assert new is not None
    assert torch.equal(new[0, 0, [0, 5]], old[0, 0, [0, 5]])
    middle = old[0, 0, 1:5]
    torch.testing.assert_close(new[0, 0, 1:5, 1], middle[:, 1] ** 0.25)
    # The share of the rest keeps its digits where it is small: to first order it is k times less.
    assert float(new[0, 0, 4, 0] / old[0, 0, 4, 0]) == pytest.approx(0.25, rel=1e-6)


@torch.no_grad()
def test_it_is_a_bias_that_depends_on_the_data(request: pytest.FixtureRequest) -> None:
    """(k - 1) log(pi) - log((1 - pi^k) / (1 - pi)) on the prompt's logits, by the engine's log."""
    subject = make("stories", request)
    power, seen = 0.4, []

    def look(call: Any, extra: ab.Bias | None, output: Tensor) -> None:
        scores = (call.query @ call.key.repeat_interleave(2, 1).mT * call.scale).double()
        plain = (scores + call.bias.dense()).softmax(-1)
        pi = plain[..., :4].sum(-1)
        assert extra is not None
        found = extra.dense()
        rows = slice(4, None)  # these see more than the prompt
        wanted = (power - 1) * pi.log() - ((1 - pi**power) / (1 - pi)).log()
        seen.append(float((found[..., 0] - found[..., -1] - wanted)[:, :, rows].abs().max()))

    rule = ab.rules.SplitSoftmax(power=power, phase="both", layers=[0], heads="all")
    from attnbias.hub import attach

    class First(Watch):
        def see(self, call: Any, extra: Any, output: Tensor, lse: Any) -> None:
            if call.site.layer == 0:
                super().see(call, extra, output, lse)

    with (
        ab.steer(subject.model, rule, spans={"system": (0, 4)}),
        attach(subject.model, First(look)),
    ):
        subject.model(input_ids=tokens(2, 11))
    assert len(seen) == 1
    assert seen[0] < 2e-4
