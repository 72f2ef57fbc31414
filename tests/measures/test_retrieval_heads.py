"""RetrievalHeads beside a greedy loop without a cache over whole eager maps, in float64."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, RetrievalHeads, haystacks
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

NEEDLE = (7, 12)
STEPS = 6


class TestRetrievalHeads(MeasureCase):
    """Greedy answers of two prompts; every trial counts."""

    subjects = ("stories", "mistral", "llava")
    count = "distinct"
    least: float | None = None
    padding: str | None = None
    given = False

    def build(self, subject: Subject) -> Measure:
        return RetrievalHeads(count=self.count, least=self.least, steps=STEPS)  # type: ignore[arg-type]

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        given: dict[str, Any] = {**subject.inputs, "needle": [NEEDLE, (6, 13)]}
        ids = given["input_ids"]
        if subject.name != "llava":  # so long that something is there to copy
            least, most = {"stories": (259, 512), "mistral": (3, models.VOCABULARY)}[subject.name]
            generator = torch.Generator().manual_seed(3)
            ids = torch.randint(least, most, (2, 50), generator=generator)
            given["needle"] = [(5, 49), (2, 44)]
        given["input_ids"], given["attention_mask"] = ids, torch.ones_like(ids)
        if self.padding:
            pad = {"left": (3, 0), "right": (0, 3)}[self.padding]
            given["input_ids"] = torch.nn.functional.pad(ids, pad, value=0)
            given["attention_mask"] = torch.nn.functional.pad(torch.ones_like(ids), pad)
        if self.given:
            given["answer"] = ids[:, 7:12].repeat(1, 4)
        return [given]

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        inputs = {word: value for word, value in given.items() if word != "needle"}
        needles = given["needle"]
        found = []
        for number in range(2):
            row: dict[str, Any] = {w: v[number : number + 1] for w, v in inputs.items()}
            found.append({**row, "needle": needles[number]})
        return found

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        twin = subject.eager().double()
        (given,) = self.data(subject)
        found = []
        for number in range(2):
            keep = given["attention_mask"][number].bool()
            row: dict[str, Any] = {"input_ids": given["input_ids"][number : number + 1, keep]}
            if "pixel_values" in given:
                row["pixel_values"] = given["pixel_values"][number : number + 1].double()
            answer = given["answer"][number].tolist() if self.given else None
            found.append(self.trial(twin, row, given["needle"][number], answer))
        return torch.stack(found)

    def trial(
        self, twin: Any, row: dict[str, Any], needle: tuple[int, int], answer: list[int] | None
    ) -> Tensor:
        prompt, copied = row["input_ids"][0].tolist(), None
        said: list[int] = []
        end = twin.config.get_text_config().eos_token_id
        while len(said) < (STEPS if answer is None else len(answer)) and end not in said:
            ids = torch.tensor([prompt + said])
            with torch.no_grad():
                out = twin(**{**row, "input_ids": ids}, output_attentions=True)
            said.append(int(out.logits[0, -1].argmax()) if answer is None else answer[len(said)])
            if copied is None:
                copied = [[[] for _ in p[0]] for p in out.attentions]
            for layer, p in enumerate(out.attentions):
                for head in range(p.shape[1]):
                    best = int(p[0, head, -1].argmax())
                    if needle[0] <= best < needle[1] and prompt[best] == said[-1]:
                        copied[layer][head].append(said[-1])
        inside = prompt[needle[0] : needle[1]]
        assert copied is not None
        if self.count == "steps":
            return torch.tensor([[len(c) / len(inside) for c in line] for line in copied])
        return torch.tensor([[len(set(c)) / len(set(inside)) for c in line] for line in copied])


class TestRetrievalHeadsByStepsLeftPadded(TestRetrievalHeads):
    subjects = ("stories", "mistral")
    count = "steps"
    padding = "left"


class TestRetrievalHeadsOfAGivenAnswer(TestRetrievalHeads):
    subjects = ("stories", "llava")
    given = True

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        self.padding = "right" if subject.name == "stories" else None
        return super().data(subject)


def test_something_is_copied(request: pytest.FixtureRequest) -> None:
    """The cases above compare numbers that are not all zero."""
    found = []
    for case, names in (
        (TestRetrievalHeads(), ("stories", "mistral")),
        (TestRetrievalHeadsOfAGivenAnswer(), ("stories", "llava")),
    ):
        subjects = [models.make(name, request) for name in names]
        found += [case.values(case.measured(subject)).sum() for subject in subjects]
    assert all(float(total) > 0 for total in found), found


def copier(request: pytest.FixtureRequest) -> tuple[Any, Tensor]:
    """stories260K, as it is, and what it says after twice the same words."""
    model = copy.deepcopy(models.stories(request.getfixturevalue("stories")).model)
    return model, models.tokens(1, 13)


def test_a_given_answer_is_read_and_unanswered_trials_do_not_count(
    request: pytest.FixtureRequest,
) -> None:
    model, ids = copier(request)
    prompt = torch.cat([ids, ids[:, :4]], 1)
    trial = {"input_ids": prompt, "needle": (4, 7), "answer": ids[:, 4:7]}
    forced = RetrievalHeads().measure(model, [trial])
    assert forced.details["kept"] == [True]
    assert forced.details["recall"].tolist() == [1.0]
    # By hand, from the eager map of prompt and answer.
    twin = copy.deepcopy(model).double()
    twin.set_attn_implementation("eager")
    with torch.no_grad():
        out = twin(torch.cat([prompt, ids[:, 4:6]], 1), output_attentions=True)
    for layer, p in enumerate(out.attentions):
        best = p[0, :, -3:].argmax(-1)
        hits = (best == torch.tensor([4, 5, 6])).sum(-1) / 3
        torch.testing.assert_close(forced.samples[0, layer], hits.double())
    trial = {"input_ids": prompt, "needle": (4, 7)}
    answered = RetrievalHeads(steps=5).measure(model, [trial])
    assert answered.details["recall"][0] < 0.5
    assert answered.samples.isnan().all()
    assert not RetrievalHeads(steps=5, least=None).measure(model, [trial]).samples.isnan().any()


def test_haystacks_are_cut_and_marked() -> None:
    text, needle, question = torch.arange(100, 200), torch.tensor([7, 8]), torch.tensor([9])
    grid = haystacks(text, needle, question, lengths=(20, 40), depths=(0, 0.5, 1), stop=105)
    assert [len(one["input_ids"][0]) for one in grid] == [20] * 3 + [40] * 3
    for one in grid:
        start, stop = one["needle"]
        assert one["input_ids"][0, start:stop].tolist() == [7, 8]
        assert int(one["input_ids"][0, -1]) == 9
    assert [one["needle"][0] for one in grid] == [0, 6, 17, 0, 6, 37]
    begun = haystacks(text, needle, question, lengths=(9,), depths=(0.5,), begin=torch.tensor([1]))
    assert begun[0]["input_ids"].tolist() == [[1, 100, 101, 7, 8, 102, 103, 104, 9]]
    assert begun[0]["needle"] == (3, 5)
    with pytest.raises(AttnbiasError, match="needs"):
        haystacks(text, needle, question, lengths=(200,), depths=(0,))


def test_bad_input_is_one_sentence(request: pytest.FixtureRequest) -> None:
    subject = models.mistral()
    for bad, words in (
        ({}, "needle"),
        ({"needle": (5, 99)}, "inside"),
        ({"needle": [(1, 2)]}, "as many"),
    ):
        with pytest.raises(AttnbiasError, match=words):
            RetrievalHeads().measure(subject.model, [{**subject.inputs, **bad}])
    with pytest.raises(AttnbiasError, match="count"):
        RetrievalHeads(count="all")  # type: ignore[arg-type]
    bart = models.make("bart encoder", request)
    with pytest.raises(ab.Refused, match="tower"):
        RetrievalHeads().measure(bart.model, [{**bart.inputs, "needle": (0, 2)}])
