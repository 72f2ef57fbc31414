"""Observing and steering a fused model: what the stock model gives, bit for bit, and fused after.

Every class that inherits the case of fused families is tried, so a new family is, too.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import nn

import attnbias as ab
from attnbias.errors import Refused
from attnbias.fuse import modes
from attnbias.fuse.door import MARK
from tests.cases.fuse import FuseCase, same, state
from tests.cases.fuse_found import cases
from tests.fuse.test_t5 import TestT5 as T5Case

CASES = cases()


def rule(model: nn.Module) -> Any:
    """More attention to the first tokens, in the first tower."""
    towers = tuple(site.tower for site in ab.sites(model)[:1]) or None
    return ab.rules.KeyShift(keys="first", factor=3.0, heads="all", towers=towers)


def seen(case: FuseCase, model: nn.Module, given: dict[str, Any]) -> Any:
    """The output, and what is seen, of a plain and of a steered run; sentences where refused."""
    found: list[Any] = []
    statistics = [ab.statistics.Entropy(), ab.statistics.Received()]
    try:
        with ab.observe(model, statistics) as looked, torch.no_grad():
            found.append(case.output(model(**given)))
        found.append(str(looked))
    except Refused as refusal:
        found.append(str(refusal))
    try:
        with ab.steer(model, rule(model), spans={"first": (0, 3)}), torch.no_grad():
            found.append(case.output(model(**given)))
    except Refused as refusal:
        found.append(str(refusal))
    return found


def alike(one: list[Any], other: list[Any]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_rooms_see_the_stock_model(name: str) -> None:
    case = CASES[name]()
    model = case.model()
    given = case.inputs(2, 19)
    wanted = seen(case, model, given)
    with ab.fuse(model, quiet=True, measure=False, check=False), modes.taking("fused"):
        marked = sum(MARK in vars(one) for one in model.modules())
        fused = case.run(model, given)
        assert alike(seen(case, model, given), wanted)
        assert sum(MARK in vars(one) for one in model.modules()) == marked > 0
        with modes.recording() as calls:
            assert torch.equal(case.run(model, given), fused)
        assert calls


def t5() -> tuple[FuseCase, nn.Module, dict[str, Any]]:
    case = T5Case()
    return case, case.model(), case.inputs(2, 19)


def test_a_steered_fused_model_is_steered() -> None:
    case, model, given = t5()
    plain = case.run(model, given, None)
    with ab.fuse(model, quiet=True, measure=False):
        _, _, steered = seen(case, model, given)
    assert case.off(steered, plain) > 1e-3


def test_support_says_the_same() -> None:
    _, model, _ = t5()
    wanted = str(ab.support(model))
    with ab.fuse(model, quiet=True, measure=False):
        assert str(ab.support(model)) == wanted
    assert "6 of 6 attention layers" in wanted


def test_generation_under_a_rule() -> None:
    case, model, given = t5()
    found = []
    for fused in (False, True):
        if fused:
            ab.fuse(model, quiet=True, measure=False)
        with ab.steer(model, rule(model), spans={"first": (0, 3)}):
            found.append(case.generate(model, given).sequences)  # type: ignore[attr-defined]
    assert torch.equal(*found)
    assert not torch.equal(found[0], case.generate(model, given).sequences)  # type: ignore[attr-defined]
    ab.fuse.undo(model)  # type: ignore[attr-defined]


def test_a_part_of_a_fused_model() -> None:
    """Also where the context is on a part of what is fused, or on more than it."""
    case, model, given = t5()
    encoder: Any = model.encoder
    both = nn.ModuleDict({"one": model})
    alone = {"input_ids": given["input_ids"]}

    def looked(where: nn.Module) -> str:
        with ab.observe(where, [ab.statistics.Entropy()]) as found, torch.no_grad():
            encoder(**alone)
        return str(found)

    wanted = looked(encoder)
    with ab.fuse(model, quiet=True, measure=False):
        assert looked(encoder) == wanted
    with ab.fuse(encoder, quiet=True, measure=False):
        with ab.observe(both, [ab.statistics.Entropy()]) as found, torch.no_grad():
            assert MARK not in vars(encoder)
            case.output(model(**given))
        assert "decoder" in str(found)
        assert MARK in vars(encoder)


def test_contexts_nest_and_an_error_in_one_leaves_the_model_fused() -> None:
    case, model, given = t5()
    before = state(model)
    with ab.fuse(model, quiet=True, measure=False):
        fused = case.run(model, given)
        with contextlib.suppress(ZeroDivisionError), ab.observe(model, [ab.statistics.Entropy()]):
            with ab.observe(model, [ab.statistics.Peak()]), torch.no_grad():
                model(**given)
            assert not any(MARK in vars(one) for one in model.modules())
            raise ZeroDivisionError
        assert torch.equal(case.run(model, given), fused)
    same(before, state(model))


def test_undone_inside_a_context_it_stays_undone() -> None:
    _, model, given = t5()
    before = state(model)
    fused = ab.fuse(model, quiet=True, measure=False)
    with ab.observe(model, [ab.statistics.Entropy()]), torch.no_grad():
        model(**given)
        fused.undo()
    same(before, state(model))


def test_what_is_refused() -> None:
    _, model, _ = t5()
    with (
        ab.observe(model, [ab.statistics.Entropy()]),
        pytest.raises(Refused, match="is being observed or steered; fuse it before"),
    ):
        ab.fuse(model, quiet=True)
    with ab.fuse(model, quiet=True, measure=False):
        other = copy.deepcopy(model)
        with (
            pytest.raises(Refused, match="is a copy of a fused model"),
            ab.observe(other, [ab.statistics.Entropy()]),
        ):
            pass
    assert not any(MARK in vars(one) for one in model.modules())
