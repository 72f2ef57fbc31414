"""What a rule that drives `generate` must pass: subclass `DriverCase` and give a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.hook import _state
from tests.cases.rule import padded
from tests.steer.models import Subject, make


class DriverCase:
    """The inherited case (subclasses are collected, this class is not).

    A subclass sets `rule(subject)`, ready to run; `oracle(model, ids, rule)`: the same decoding
    written down with whole maps, on a copy of the model with eager attention; and, where a setting
    of the rule leaves plain decoding, `neutral(subject)`.
    """

    __test__: ClassVar[bool] = False
    span: ClassVar[str] = "context"
    place: ClassVar[tuple[int, int]] = (1, 5)
    count: ClassVar[int] = 9  # new tokens
    subjects: ClassVar[tuple[str, ...]] = ("stories",)
    plain_by: ClassVar[dict[str, Any]] = {"do_sample": False}  # the decoding that `neutral` leaves

    def rule(self, subject: Subject) -> ab.steer.Rule:
        raise NotImplementedError

    def oracle(self, model: Any, ids: Tensor, rule: Any) -> Tensor:
        raise NotImplementedError

    def neutral(self, subject: Subject) -> ab.steer.Rule | None:
        return None

    # Helpers --------------------------------------------------------------------------------------

    def run(
        self, subject: Subject, rule: ab.steer.Rule | None, spans: Any = None, **inputs: Any
    ) -> Tensor:
        options = {"max_new_tokens": self.count, "pad_token_id": 0, "eos_token_id": None}
        options |= self.plain_by
        torch.manual_seed(5)
        if rule is None:
            return subject.model.generate(**inputs, **options)  # type: ignore[no-any-return, operator]
        with ab.steer(subject.model, rule, spans={self.span: spans or self.place}):
            return subject.model.generate(**inputs, **options)  # type: ignore[no-any-return, operator]

    @pytest.fixture(params=["each"])
    def driven(self, request: pytest.FixtureRequest) -> list[Subject]:
        return [make(name, request) for name in self.subjects]

    # The case -------------------------------------------------------------------------------------

    def test_is_the_plain_loop(self, driven: list[Subject]) -> None:
        for subject in driven:
            ids, rule = subject.inputs["input_ids"][:1], self.rule(subject)
            found = self.run(subject, rule, input_ids=ids)
            torch.manual_seed(5)
            wanted = self.oracle(subject.eager(), ids, rule)
            assert torch.equal(found, wanted), subject.name
            assert not torch.equal(found, self.run(subject, None, input_ids=ids)), subject.name

    def test_nothing_to_do_is_the_plain_model(self, driven: list[Subject]) -> None:
        for subject in driven:
            rule = self.neutral(subject)
            ids = subject.inputs["input_ids"][:1]
            if rule is not None:
                found = self.run(subject, rule, input_ids=ids)
                assert torch.equal(found, self.run(subject, None, input_ids=ids)), subject.name
            with (
                torch.no_grad(),
                ab.steer(subject.model, self.rule(subject), spans={self.span: self.place}),
            ):
                inside = subject.run()
            with torch.no_grad():  # a forward that nobody drives
                assert torch.equal(inside, subject.run()), subject.name

    def test_the_first_row_of_a_padded_batch_is_what_it_is_alone(
        self, driven: list[Subject]
    ) -> None:
        for subject in driven:
            inputs, _, rows = padded(subject, "left")
            del inputs["position_ids"]
            rule, spans = self.rule(subject), [self.place, (2, 4)]
            found = self.run(subject, rule, spans, **inputs)
            alone = self.run(subject, rule, spans[0], input_ids=inputs["input_ids"][:1])
            assert torch.equal(found[:1], alone), subject.name
            assert found.shape == (2, rows[0].stop + self.count), subject.name

    def test_restores_on_exit_and_on_exception(self, driven: list[Subject]) -> None:
        for subject in driven:
            ids, rule = subject.inputs["input_ids"][:1], self.rule(subject)
            before, calls = _state(subject.model), []

            def fail(tokens: Tensor, scores: Any, _calls: list[int] = calls, **_: Any) -> Tensor:
                _calls.append(tokens.shape[1])
                if len(_calls) == 4:
                    raise RuntimeError("in the middle")
                return torch.zeros(len(tokens), dtype=torch.bool)

            plain = self.run(subject, None, input_ids=ids)
            wanted = self.run(subject, rule, input_ids=ids)
            assert _state(subject.model) == before, subject.name
            with pytest.raises(RuntimeError, match="in the middle"):
                self.run(subject, rule, input_ids=ids, stopping_criteria=[fail])
            assert _state(subject.model) == before, subject.name
            assert torch.equal(self.run(subject, None, input_ids=ids), plain), subject.name
            assert torch.equal(self.run(subject, rule, input_ids=ids), wanted), subject.name

    def test_beams_are_refused(self, driven: list[Subject]) -> None:
        for subject in driven:
            with pytest.raises(ab.Refused, match="beams"):
                self.run(
                    subject,
                    self.rule(subject),
                    input_ids=subject.inputs["input_ids"],
                    num_beams=2,
                )

    def test_survives_json(self, driven: list[Subject], tmp_path: Path) -> None:
        rule = self.rule(driven[0])
        recipe = ab.Recipe((rule,), "some/model")
        recipe.save(tmp_path / "recipe.json")
        assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
