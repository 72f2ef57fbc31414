"""What a rule on a diffusers UNet must pass: subclass `UNetCase` and write it down by hand."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from tests.cases.rule import RELATIVE, off
from tests.steer.test_diffusion import state
from tests.steer.unets import inputs, unet


class UNetCase:
    """The inherited case (subclasses are collected, this class is not).

    A subclass sets `rule(strength)`, `zero` and `strengths`, the spans, and `oracle(model,
    strength, timestep)`: a context in which `model`, or the model that it gives, does the same by
    hand.
    """

    __test__: ClassVar[bool] = False
    gated: ClassVar[bool] = False
    spans: ClassVar[dict[str, Any]] = {}
    zero: ClassVar[Any]
    strengths: ClassVar[tuple[Any, ...]]
    steps: ClassVar[tuple[int, ...]] = (950, 100)

    def rule(self, strength: Any) -> ab.steer.Rule:
        raise NotImplementedError

    def oracle(
        self, model: Any, strength: Any, timestep: int
    ) -> contextlib.AbstractContextManager[Any]:
        raise NotImplementedError

    def given(self, timestep: int = 950) -> dict[str, Any]:
        return inputs(timestep=timestep)

    @pytest.fixture
    def model(self) -> Any:
        return unet(gated=self.gated)

    def steered(self, model: Any, *rules: ab.steer.Rule, **given: Any) -> Tensor:
        with torch.no_grad(), ab.steer(model, *rules, spans=self.spans):
            found: Tensor = model(**given).sample
        return found

    @torch.no_grad()
    def test_zero_strength_is_the_plain_model(self, model: Any) -> None:
        for step in self.steps:
            given = self.given(step)
            found = self.steered(model, self.rule(self.zero), **given)
            assert torch.equal(found, model(**given).sample)

    @torch.no_grad()
    def test_equals_the_same_by_hand(self, model: Any) -> None:
        for strength in self.strengths:
            for step in self.steps:
                given = self.given(step)
                found = self.steered(model, self.rule(strength), **given)
                with self.oracle(model, strength, step) as other:
                    wanted = (other if isinstance(other, nn.Module) else model)(**given).sample
                assert off(found, wanted) < RELATIVE, (strength, step)
                assert off(model(**given).sample, wanted) > 30 * RELATIVE, (strength, step)

    def test_rows_of_a_batch_do_not_touch_each_other(self, model: Any) -> None:
        rule, given = self.rule(self.strengths[-1]), self.given()
        other = {**given, "sample": given["sample"].clone()}
        other["sample"][1] = other["sample"][1].flip(-1)
        found = self.steered(model, rule, **given)
        changed = self.steered(model, rule, **other)
        assert off(changed[0], found[0]) < RELATIVE
        assert off(changed[1], found[1]) > 30 * RELATIVE

    @torch.no_grad()
    def test_restores_on_exit_and_on_exception(self, model: Any) -> None:
        before, given = state(model), self.given()
        plain = model(**given).sample
        assert not torch.equal(self.steered(model, self.rule(self.strengths[-1]), **given), plain)
        assert state(model) == before

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        hook = model.conv_out.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="in the middle"):
            self.steered(model, self.rule(self.strengths[-1]), **given)
        hook.remove()
        assert state(model) == before
        assert torch.equal(model(**given).sample, plain)

    def test_composes_with_a_bias(self, model: Any) -> None:
        shift = ab.rules.KeyShift(keys=[1], factor=6.0, heads="all", towers=("cross",))
        rule, given = self.rule(self.strengths[-1]), self.given()
        both = self.steered(model, shift, rule, **given)
        assert off(self.steered(model, shift, **given), both) > 30 * RELATIVE
        assert off(self.steered(model, rule, **given), both) > 30 * RELATIVE
        with torch.no_grad(), ab.steer(model, shift), ab.steer(model, rule, spans=self.spans):
            assert off(model(**given).sample, both) < RELATIVE

    def test_survives_json(self, tmp_path: Path) -> None:
        recipe = ab.Recipe(tuple(map(self.rule, self.strengths)), "some/model", "abc123")
        recipe.save(tmp_path / "recipe.json")
        assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
