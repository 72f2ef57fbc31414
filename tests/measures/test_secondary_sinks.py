"""Secondary sinks: the detector by loops on real and tiny models, planted sinks, the rescaling."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import Measure, SecondarySinks
from attnbias.measures.secondary_sinks import Sinks
from experiments.secondary_attention_sinks import FIRST, LEVELS, SECOND, find, hits, planted, score
from tests.cases.measure import Maps, MeasureCase
from tests.measures.plain import states
from tests.steer import models
from tests.steer.models import Subject

KINDS = ("noise", "secondary", "primary")


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / (one.norm() * other.norm()))


class TestSecondarySinks(MeasureCase):
    least_cosine: ClassVar[float] = 0.3

    def build(self, subject: Subject) -> Measure:
        return SecondarySinks(cosine=self.least_cosine, slack=1, least=0)

    def values(self, result: Sinks) -> Tensor:
        """(samples, layers + 5, tokens): aligned, then kind, norm, cosine, score, received."""
        aligned = result.aligned.double()
        more = torch.full((len(aligned), 4, aligned.shape[-1]), torch.nan, dtype=torch.float64)
        for one in result.sinks:
            numbers = [KINDS.index(one.kind), one.norm, one.cosine, one.score]
            more[one.sample, :, one.position] = torch.tensor(numbers, dtype=torch.float64)
        return torch.cat([aligned, more, result.received.mean(1, keepdim=True)], 1)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (attention,) = maps.values()
        hidden, added = states(subject), states(subject, of_mlp=True)
        depth, _, tokens = hidden.shape[:3]
        found = []
        for row in range(hidden.shape[1]):
            norms = [[float(hidden[at, row, t].norm()) for t in range(2)] for at in range(depth)]
            sums = [sum(line[t] for line in norms) for t in range(2)]
            p = 0 if sums[0] >= sums[1] else 1
            steps = [norms[at + 1][p] - norms[at][p] for at in range(depth - 1)]
            start = steps.index(max(steps)) + 1
            drops = steps[start:]
            stop = start + 1 + drops.index(min(drops)) if drops else depth
            grid = torch.zeros(depth, tokens, dtype=torch.float64)
            more = torch.full((4, tokens), torch.nan, dtype=torch.float64)
            got = torch.stack([self._received(m[row], subject.causal) for m in attention])
            for token in range(p, tokens):
                where = [
                    at
                    for at in range(start, stop)
                    if token == p
                    or abs(cosine(hidden[at, row, token], hidden[at, row, p])) > self.least_cosine
                ]
                if not where:
                    continue
                grid[where, token] = 1.0
                life = 2 if len(where) >= depth - 1 else 1
                first = where[0]
                read = [float(got[at + 1, token]) for at in where if at + 1 < depth]
                more[:, token] = torch.tensor(
                    [
                        life,
                        added[first, row, token].norm(),
                        cosine(added[first, row, token], hidden[first, row, p]),
                        sum(read) / len(read) if read else math.nan,
                    ]
                )
            found.append(torch.cat([grid, more, got.mean(0, keepdim=True)]))
        return torch.stack(found)

    @staticmethod
    def _received(maps: Tensor, causal: bool) -> Tensor:
        columns = range(maps.shape[-1])
        return torch.stack([maps[:, (k if causal else 0) :, k].mean() for k in columns])


class TestSecondarySinksAllTokens(TestSecondarySinks):
    least_cosine = 0.0
    subjects = ("stories",)


def test_planted_sinks_are_found_with_their_layers_and_levels() -> None:
    made = planted(0)
    found = find(made)
    assert hits(made, found) == 1.0
    assert found.levels == {(3, 7): 8, (6, 4): 8}
    assert {one.position for one in found.of("primary")} == {0}
    for one in found.of("secondary"):
        assert one.cosine > 0.99
        assert one.norm == pytest.approx(LEVELS[FIRST if one.start == 3 else SECOND][1], rel=0.3)
    assert "8 from layer 3 for 7 layers" in str(found)


def test_more_norm_more_attention_and_random_directions_none() -> None:
    grown = []
    for factor in (0.05, 0.2, 1.0):
        made = planted(0, factor=factor)
        grown.append(score(made, find(made), FIRST))
    assert grown == sorted(grown)
    assert grown[-1] > 3 * grown[0]
    other = planted(0, along=False)
    found = find(other)
    assert not found.of("secondary")
    assert score(other, found, FIRST) < grown[-1] / 3


def test_rescaling_removes_them_and_leaves_the_rest() -> None:
    made = planted(0)
    found = find(made)
    with ab.steer(made.model, found.rescaling(3, 1.0)):
        less = find(made)
    assert less.levels == {(6, 4): 8}  # the other level stays
    with torch.no_grad():
        plain = made.model(input_ids=made.rows).logits
        with ab.steer(made.model, found.rescaling(3, 1e-3, clip=True)):
            clipped = made.model(input_ids=made.rows).logits
        with ab.steer(made.model, found.rescaling(3, 1e6, clip=True)):
            same = made.model(input_ids=made.rows).logits
    assert float((clipped - plain).abs().max()) > 1e-3
    assert torch.equal(same, plain)
    early = (made.rows != FIRST).cumprod(-1).bool()  # before the token nothing may change
    assert torch.equal(clipped[early], plain[early])


def test_rescaling_skips_the_first_positions_and_raises_small_norms() -> None:
    made = planted(0)
    found = find(made)
    with ab.steer(made.model, found.rescaling(3, 1000.0)):  # larger than what is written
        more = find(made)
    assert score(made, more, FIRST) > score(made, found, FIRST)
    with ab.steer(made.model, found.rescaling(3, 0.0, skip=48)):
        assert find(made).levels == found.levels
    primary = [one for one in more.sinks if one.position == 0]
    before = [one for one in found.sinks if one.position == 0]
    assert [one.layers for one in primary] == [one.layers for one in before]


def test_lifetimes_decide_the_kind() -> None:
    made = planted(0)
    data: list[Any] = [{"input_ids": made.rows}]
    noisy = SecondarySinks(slack=4, least=4).measure(made.model, data)
    assert noisy.levels == {(3, 7): 8}  # a lifetime of 4 is not more than 4
    assert {one.start for one in noisy.of("noise")} == {6}
    long = SecondarySinks(slack=5, least=2).measure(made.model, data)
    assert long.levels == {(6, 4): 8}  # a lifetime of 7 is 12 - 5
    assert len(long.of("primary")) == 16


def test_a_shallow_model_is_refused_with_what_to_do() -> None:
    subject = models.MAKERS["mistral"]()
    with pytest.raises(Refused, match=r"3 layers.*slack=1, least=0"):
        SecondarySinks().measure(subject.model, [subject.inputs])
    for bad in ({"cosine": 2.0}, {"slack": -1}, {"candidates": 0}):
        with pytest.raises(AttnbiasError, match=next(iter(bad))):
            SecondarySinks(**bad)
    found = SecondarySinks(slack=1, least=0).measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="layer"):
        found.rescaling(9)
    with pytest.raises(AttnbiasError, match="norm"):
        found.rescaling(1, -1.0)
