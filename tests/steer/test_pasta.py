from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RELATIVE, RuleCase, off
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import Subject, make

SECTION = (range(1, 3), range(5, 6))


class TestPASTA(RuleCase):
    __test__ = True
    zero, small, large = 1.0, 0.5, 0.01

    def rule(self, strength: float, **where: Any) -> ab.rules.PASTA:
        return ab.rules.PASTA(keys=SECTION, alpha=strength, scope="all", **where)

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        """The printed equation: weights outside G times alpha, each row divided by its sum."""

        def rewrite(found: Map) -> Tensor:
            inside = torch.isin(found.positions, torch.tensor([1, 2, 5]))[:, None, None]
            weights = found.probabilities * torch.where(inside, 1.0, strength)
            sums = weights.sum(-1, keepdim=True) + found.rest
            # Rows that see no section keep their ratios, and their share of a sink falls.
            return weights / sums

        return rewrite


@pytest.fixture
def llama(request: pytest.FixtureRequest) -> Subject:
    return make("stories", request)


def released(side: str, alpha: float, ranges: list[tuple[int, int]], length: int) -> Tensor:
    """What the released library adds to the mask of a prompt of `length` tokens, 13 keys."""
    line = torch.zeros(13, dtype=torch.float64)
    log = torch.tensor(alpha, dtype=torch.float64).log()
    for start, stop in ranges:
        if side == "include":
            line[start:stop] += log
        else:
            line[:start] += log
            line[stop:length] += log
    if side == "include":
        line[:length] -= log
    return line


@torch.no_grad()
@pytest.mark.parametrize("side", ["include", "exclude"])
@pytest.mark.parametrize("ranges", [[(1, 3)], [(1, 3), (5, 7)]])
def test_sections_summed_are_what_was_released(
    llama: Subject, side: Any, ranges: list[tuple[int, int]]
) -> None:
    """Tokens after the prompt keep their weight; every section adds its own edit."""
    rule = ab.rules.PASTA(
        keys=["a", "b"][: len(ranges)], alpha=0.2, side=side, sections="summed", heads=[0, 3, 5]
    )
    spans = dict(zip("ab", ranges, strict=False)) | {"generated": (9, None)}
    with ab.steer(llama.model, rule, spans=spans):
        found = llama.run()
    factor = released(side, 0.2, ranges, 9).exp()

    def rewrite(map_: Map) -> Tensor:
        weights = map_.probabilities * factor
        return weights / weights.sum(-1, keepdim=True)

    eager = llama.eager()
    with rewritten(eager, [DenseEdit(rewrite, heads=[0, 3, 5])]):
        wanted = llama.run(eager)
    assert off(found, wanted) < RELATIVE
    assert off(llama.run(), wanted) > 30 * RELATIVE


@torch.no_grad()
def test_one_section_is_the_same_both_ways(llama: Subject) -> None:
    def run(**fields: Any) -> Tensor:
        rule = ab.rules.PASTA(keys=["a"], heads="all", **fields)
        with ab.steer(llama.model, rule, spans={"a": (2, 5), "generated": (9, None)}):
            return llama.run()

    one = run()
    assert torch.equal(run(sections="summed"), one)
    # Strengthening G by 100 is weakening the rest by 100 where nothing else is there.
    assert off(run(scope="all"), run(side="include", alpha=100.0)) < RELATIVE
    assert off(run(scope="all"), one) > 30 * RELATIVE


@torch.no_grad()
def test_padding_is_no_part_of_a_prompt(llama: Subject) -> None:
    """With a sink-free model the edit of padding would not show: its weight must stay 0."""
    from attnbias.hub import attach
    from tests.cases.rule import Watch, padded

    inputs, positions, _ = padded(llama, "left")
    seen: list[Any] = []
    watch = Watch(lambda call, extra, output: seen.append(extra))
    rule = ab.rules.PASTA(keys=["a"], heads="all")
    spans = {"a": (2, 5), "generated": (7, None)}
    with ab.steer(llama.model, rule, spans=spans), attach(llama.model, watch):
        llama.run(**inputs)
    weight = seen[0].dense()[:, 0, 0]
    outside = (positions >= 0) & (positions < 7) & ((positions < 2) | (positions >= 5))
    assert torch.equal(weight != 0, outside)


def test_what_is_refused(llama: Subject) -> None:
    for fields, words in (
        ({"alpha": 0.0}, "alpha must be a finite number above 0, got 0.0"),
        ({"side": "left"}, "side must be 'exclude' or 'include', got 'left'"),
        ({"scope": "page"}, "scope must be"),
        ({"sections": "both"}, "sections must be"),
        ({"keys": []}, "keys must name at least one"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words):
            ab.rules.PASTA(**({"keys": ["a"], "heads": "all"} | fields))
    rule = ab.rules.PASTA(keys=["a"], heads="all")
    with (
        pytest.raises(ab.AttnbiasError, match="needs the span 'generated'"),
        ab.steer(llama.model, rule, spans={"a": (1, 2)}),
    ):
        pass
