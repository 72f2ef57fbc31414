from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RuleCase
from tests.steer.dense import Map
from tests.steer.models import make

KEYS = (1, 8, 10)


class TestHardPattern(RuleCase):
    __test__ = True
    zero, small, large = 0.0, 0.3, 1.0

    def rule(self, strength: float, **where: Any) -> ab.rules.HardPattern:
        return ab.rules.HardPattern(keys=KEYS, strength=strength, **({"phase": "both"} | where))

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        """Overwrite the row of the last query."""

        def rewrite(found: Map) -> Tensor:
            p = found.probabilities
            keys = torch.isin(found.positions, torch.tensor(KEYS))[:, None, None]
            chosen = (keys & (found.scores > -torch.inf)).to(p.dtype)
            count = chosen.sum(-1, keepdim=True)
            mixed = (1 - strength) * p + strength * chosen / count.clamp(min=1)
            last = found.last if p.shape[2] in (1, p.shape[3]) else _last(p.shape[2])
            return torch.where(last[:, None, :, None] & (count > 0), mixed, p)

        return rewrite


def _last(queries: int) -> Tensor:
    return (torch.arange(queries) == queries - 1)[None]


@torch.no_grad()
@pytest.mark.parametrize("name", ["stories", "gpt_oss", "bart cross"])
def test_the_row_is_the_pattern(name: str, request: pytest.FixtureRequest) -> None:
    """Exactly 1/n on the chosen keys and nothing elsewhere, also where a sink would take most."""
    from attnbias.hub import attach
    from tests.cases.rule import Watch

    subject = make(name, request)
    rows: list[Tensor] = []

    def look(call: Any, extra: Any, output: Tensor) -> None:
        if extra is None:
            return
        bias = extra if call.bias is None else call.bias + extra
        scores = (
            call.query
            @ call.key.repeat_interleave(call.query.shape[1] // call.key.shape[1], 1).mT
            * call.scale
            + bias.dense()
        )
        sink = call.sink
        if sink is not None:
            own = sink[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, own], -1)
        rows.append(scores.softmax(-1)[:, 1, -1])

    # The last query of a window of 6 sees 7 to 12.
    keys = [8, 10, 11] if name == "gpt_oss" else [0, 2, 5]
    rule = ab.rules.HardPattern(keys=keys, heads={0: [1]}, towers=subject.towers)
    if name == "gpt_oss":
        subject.model.model.layers[0].self_attn.sinks.fill_(9.0)
    with ab.steer(subject.model, rule), attach(subject.model, Watch(look)):
        subject.run()
    assert len(rows) == 1
    wanted = torch.zeros_like(rows[0])
    wanted[:, keys] = 1 / 3
    torch.testing.assert_close(rows[0], wanted, atol=2e-5, rtol=0)


@torch.no_grad()
def test_other_queries_are_plain_and_unseen_keys_are_left_out(
    request: pytest.FixtureRequest,
) -> None:
    subject = make("mistral", request)  # the last query sees keys 7 to 12
    plain = subject.run()
    with ab.steer(subject.model, ab.rules.HardPattern(keys=[3], heads="all")):
        found = subject.run()
    assert torch.equal(found, plain)
    with ab.steer(subject.model, ab.rules.HardPattern(keys=[3, 9], heads="all")):
        both = subject.run()
    with ab.steer(subject.model, ab.rules.HardPattern(keys=[9], heads="all")):
        one = subject.run()
    assert torch.equal(both, one)
    assert torch.equal(one[:, :-1], plain[:, :-1])
    assert not torch.equal(one[:, -1], plain[:, -1])


@pytest.mark.parametrize("strength", [-0.1, 1.1, True, "1", float("nan")])
def test_bad_strengths(strength: Any) -> None:
    with pytest.raises(ab.AttnbiasError, match="strength must be a number from 0 to 1"):
        ab.rules.HardPattern(keys=[1], strength=strength, heads="all")
