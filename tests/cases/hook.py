"""What a rule must pass whose edit is no rewrite of a map: subclass `HookCase` and give an oracle.

For rules on head outputs, hidden states, neurons, tokens and logits. (Rules that edit attention
alone, by `bias` or `reallocate`, inherit from `tests.cases.rule.RuleCase`.)
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import attnbias as ab
from tests.cases.rule import RELATIVE, off, padded
from tests.steer.models import NAMES, Subject, make


class HookCase:
    """The inherited case (subclasses are collected, this class is not).

    A subclass sets `rule(strength, **where)`, three strengths, the subjects it applies to, and
    `oracle(subject, strength, model)`: a context in which `model` (a copy of the subject's) does
    the same by plain PyTorch hooks or replaced functions, without anything of the library.
    """

    __test__: ClassVar[bool] = False
    zero: ClassVar[Any]
    small: ClassVar[Any]
    large: ClassVar[Any]
    subjects: ClassVar[tuple[str, ...]] = NAMES
    padding: ClassVar[tuple[str, ...]] = ("stories", "minilm")
    caches: ClassVar[tuple[str, ...]] = ("stories",)  # the rule decides token by token there
    generates: ClassVar[tuple[str, ...]] = ("stories",)
    tolerance: ClassVar[float] = RELATIVE

    def rule(self, strength: Any, **where: Any) -> ab.steer.Rule:
        raise NotImplementedError

    def oracle(
        self, subject: Subject, strength: Any, model: Any
    ) -> contextlib.AbstractContextManager[Any]:
        raise NotImplementedError

    # What a subclass may change -------------------------------------------------------------------

    def where(self, subject: Subject) -> dict[str, Any]:
        return {} if subject.towers is None else {"towers": subject.towers}

    def spans(self, subject: Subject) -> dict[str, Any] | None:
        return None

    def steer(self, subject: Subject, strength: Any) -> contextlib.AbstractContextManager[Any]:
        rule = self.rule(strength, **self.where(subject))
        return ab.steer(subject.model, rule, spans=self.spans(subject))

    # The case -------------------------------------------------------------------------------------

    def each(self, name: str, request: pytest.FixtureRequest) -> Subject:
        return make(name, request)

    @torch.no_grad()
    def test_zero_strength_is_the_plain_model(self, request: pytest.FixtureRequest) -> None:
        for name in self.subjects:
            subject = self.each(name, request)
            plain = subject.run()
            with self.steer(subject, self.zero):
                found = subject.run()
            assert torch.equal(found, plain), name

    @torch.no_grad()
    @pytest.mark.parametrize("strength", ["small", "large"])
    def test_equals_the_oracle(self, strength: str, request: pytest.FixtureRequest) -> None:
        value = getattr(self, strength)
        for name in self.subjects:
            subject = self.each(name, request)
            plain = subject.run()
            with self.steer(subject, value):
                found = subject.run()
            model = subject.eager()
            with self.oracle(subject, value, model):
                wanted = subject.run(model)
            assert found.shape == wanted.shape, name
            assert off(found, wanted) < self.tolerance, name
            assert off(plain, wanted) > 30 * self.tolerance, name

    @torch.no_grad()
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding(self, side: str, request: pytest.FixtureRequest) -> None:
        """A row of a padded batch is what it would be alone."""
        for name in self.padding:
            subject = self.each(name, request)
            inputs, _, rows = padded(subject, side)
            plain = subject.run(**inputs)
            with self.steer(subject, self.large):
                found = subject.run(**inputs)
            for row, part in enumerate(rows):
                alone = subject.row(row, part, **inputs)
                del alone["attention_mask"]
                with self.steer(subject, self.large):
                    single = replace(subject, inputs=alone).run()
                assert off(found[row, part], single[0]) < self.tolerance, (name, row)
            assert off(found, plain) > 30 * self.tolerance

    @torch.no_grad()
    def test_rows_of_a_batch_do_not_touch_each_other(self, request: pytest.FixtureRequest) -> None:
        for name in self.subjects:
            subject = self.each(name, request)
            with self.steer(subject, self.large):
                found = subject.run()
                turned = subject.run(**subject.swapped())
            assert off(turned.flip(0), found) < self.tolerance, name
            assert off(found[:1], found[1:]) > 30 * self.tolerance, name

    @torch.no_grad()
    def test_chunks_and_every_cache(self, request: pytest.FixtureRequest) -> None:
        """Chunks, a static cache and decoding step by step give what one pass gives."""
        from transformers import DynamicCache, StaticCache

        for name in self.caches:
            subject = self.each(name, request)
            ids = subject.inputs["input_ids"]
            caches = [
                lambda model=subject.model: DynamicCache(config=model.config),
                lambda model=subject.model: StaticCache(config=model.config, max_cache_len=24),
            ]
            with self.steer(subject, self.large):
                wanted = subject.run(use_cache=False)
                for sizes in ([ids.shape[1]], [5, 3, 5], [4] + [1] * 9):
                    for cache_of in caches:
                        cache, parts, start = cache_of(), [], 0
                        for size in sizes:
                            part = ids[:, start : start + size]
                            out = subject.model(
                                input_ids=part, past_key_values=cache, use_cache=True
                            )
                            parts.append(out.logits)
                            start += size
                        assert off(torch.cat(parts, 1), wanted) < self.tolerance, (name, sizes)

    @torch.no_grad()
    def test_generate(self, request: pytest.FixtureRequest) -> None:
        """Greedy tokens, with left padding, are those of the oracle."""
        for name in self.generates:
            subject = self.each(name, request)
            inputs, _, _ = padded(subject, "left")
            inputs.pop("position_ids", None)
            options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            options |= {"eos_token_id": None}
            plain = subject.model.generate(**inputs, **options)
            with self.steer(subject, self.large):
                found = subject.model.generate(**inputs, **options)
            model = subject.eager()
            with self.oracle(subject, self.large, model):
                wanted = model.generate(**inputs, **options)
            assert torch.equal(found, wanted), name
            assert not torch.equal(plain, wanted), name

    @torch.no_grad()
    def test_restores_on_exit_and_on_exception(self, request: pytest.FixtureRequest) -> None:
        for name in self.subjects:
            subject = self.each(name, request)
            plain = subject.run()
            before = _state(subject.model)

            def fail(*_: Any) -> None:
                raise RuntimeError("in the middle")

            last = [module for module in subject.model.modules() if not list(module.children())][-1]
            with self.steer(subject, self.large):
                assert not torch.equal(subject.run(), plain), name
            assert _state(subject.model) == before, name
            hook = last.register_forward_pre_hook(fail)
            with (
                pytest.raises(RuntimeError, match="in the middle"),
                self.steer(subject, self.large),
            ):
                subject.run()
            hook.remove()
            assert _state(subject.model) == before, name
            assert torch.equal(subject.run(), plain), name

    @torch.no_grad()
    def test_composes_with_a_bias(self, request: pytest.FixtureRequest) -> None:
        """Beside a `KeyShift` in the same context, and in nested ones, both edits act."""
        subject = self.each(self.subjects[0], request)
        shift = ab.rules.KeyShift(keys=[1], factor=4.0, heads="all", **self.where(subject))
        rule = self.rule(self.large, **self.where(subject))
        spans = self.spans(subject)
        with ab.steer(subject.model, shift, rule, spans=spans):
            together = subject.run()
        with ab.steer(subject.model, shift), ab.steer(subject.model, rule, spans=spans):
            nested = subject.run()
        with ab.steer(subject.model, shift):
            one = subject.run()
        with self.steer(subject, self.large):
            other = subject.run()
        assert off(nested, together) < self.tolerance
        assert off(one, together) > 30 * self.tolerance
        assert off(other, together) > 30 * self.tolerance

    def test_survives_json(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(self.rule(self.small))
        monkeypatch.setitem(ab.steer.recipe.BUILT_IN, kind.__name__, kind)
        rules = (self.rule(self.small), self.rule(self.large))
        recipe = ab.Recipe(rules, "some/model", "abc123")
        recipe.save(tmp_path / "recipe.json")
        assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
        found = json.loads((tmp_path / "recipe.json").read_text())
        assert found["rules"][0]["rule"] == kind.__name__


def _state(model: Any) -> dict[str, Any]:
    """Everything that an edit could leave behind: weights, hooks, attributes, configs."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[f"{name} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
        found[f"{name} names"] = tuple(sorted(vars(module)))
    found["config"] = {name: id(value) for name, value in vars(model.config).items()}
    found["weights"] = {name: (id(p), p._version) for name, p in model.named_parameters()}
    return found
