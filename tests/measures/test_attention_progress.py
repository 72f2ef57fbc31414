"""Attention progress, collapse and repetition, beside loops over whole maps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.measures import AttentionProgress, Measure
from attnbias.measures.attention_progress import collapse, progress, repetition
from tests.cases.measure import Maps, MeasureCase, eager_maps
from tests.steer import models
from tests.steer.models import Subject

# The answers stand at positions 4 to 8; their keys differ between rows.
CORRECT = torch.full((2, 13, 2), -1)
CORRECT[0, 4:9] = torch.tensor([[0, 3], [1, 2], [5, -1], [2, 6], [7, 8]])
CORRECT[1, 5:9] = torch.tensor([[4, -1], [3, 2], [0, 7], [8, 1]])


class TestAttentionProgress(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral", "gpt_oss", "minilm")
    padding: ClassVar[str | None] = None

    def build(self, subject: Subject) -> Measure:
        return AttentionProgress()

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [{**self.inputs(subject), "correct": CORRECT}]

    def inputs(self, subject: Subject) -> dict[str, Tensor]:
        found = dict(subject.inputs)
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        if self.padding:
            part = slice(0, 3) if self.padding == "left" else slice(10, 13)
            found["attention_mask"][1, part] = 0
        return found

    def test_equals_the_dense_route(self, name: str, request: pytest.FixtureRequest) -> None:
        subject = models.make(name, request)
        got = self.measured(subject).samples
        assert torch.allclose(got, self.dense(subject, {}), atol=self.tolerance)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        inputs = self.inputs(subject)
        (layers,) = eager_maps(subject, inputs).values()
        found = []
        for row in range(2):
            keep = inputs["attention_mask"][row].bool()
            own = [p[row][:, keep][..., keep] for p in layers]
            upper, lower = torch.zeros(2, len(own), own[0].shape[0]).double()
            for query in range(4, 9):
                keys = [key for key in CORRECT[row, query].tolist() if key >= 0]
                for n, p in enumerate(own):
                    upper[n] += p[:, query, keys].sum(-1)
                    lower[n] += p[:, query].sum(-1) if keys else 0
            found.append(upper / lower)
        return torch.stack(found)


class TestLeftPadding(TestAttentionProgress):
    subjects: ClassVar[tuple[str, ...]] = ("stories",)
    padding: ClassVar[str | None] = "left"


class TestRightPadding(TestLeftPadding):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories")
    padding: ClassVar[str | None] = "right"


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_signs_of_the_plateau(stories: Any, padding: str | None) -> None:
    subject = models.stories(stories)
    case = TestAttentionProgress()
    type(case).padding = padding
    try:
        given = case.data(subject)[0]
    finally:
        type(case).padding = None
    details = AttentionProgress().measure(subject.model, [given]).details
    inputs = {word: value for word, value in given.items() if word != "correct"}
    with torch.no_grad():
        out = subject.model(**inputs, output_hidden_states=True)
    for row in range(2):
        keep = inputs["attention_mask"][row].bool()
        at = range(4 + row, 9)
        states = out.hidden_states[-1][row][keep].double()[list(at)]
        pairs = [
            float(torch.cosine_similarity(states[n], states[m], dim=0))
            for n in range(1, len(states))
            for m in range(1, n)
        ]
        assert float(details["collapse"][row]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
        said = out.logits[row][keep].argmax(-1)[list(at)].tolist()
        same = [a == b for a, b in itertools.pairwise(said)]
        assert float(details["repetition"][row]) == pytest.approx(sum(same) / len(same))


def test_the_functions() -> None:
    maps = torch.tensor([[[[1.0, -3.0], [2.0, 2.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    correct = torch.tensor([[False, True], [True, False]])
    found = progress(maps, correct)
    assert float(found[0, 0]) == pytest.approx(5 / 8)
    assert bool(found[1, 0].isnan())
    rows = torch.stack([correct, ~correct])
    assert float(progress(maps[:1].repeat(2, 1, 1, 1), rows)[1, 0]) == pytest.approx(3 / 8)
    assert repetition(torch.tensor([[1, 1, 2, 2, 2]])).tolist() == [0.75]
    states = torch.tensor([[[9.0, 1.0], [1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]])
    assert float(collapse(states)[0]) == pytest.approx(1 / 3)


def test_what_it_refuses(stories: Any) -> None:
    subject = models.stories(stories)
    with pytest.raises(AttnbiasError, match="correct"):
        AttentionProgress().measure(subject.model, [subject.inputs])
    bad = {**subject.inputs, "correct": CORRECT.float()}
    with pytest.raises(AttnbiasError, match="whole numbers"):
        AttentionProgress().measure(subject.model, [bad])
    with pytest.raises(AttnbiasError, match="tower must be"):
        AttentionProgress("vision").measure(subject.model, [subject.inputs])


def test_a_row_without_answers_says_nothing(stories: Any) -> None:
    subject = models.stories(stories)
    correct = CORRECT.clone()
    correct[1] = -1
    scores = AttentionProgress().measure(subject.model, [{**subject.inputs, "correct": correct}])
    assert scores.samples[1].isnan().all()
    assert not scores.samples[0].isnan().any()
    assert bool(scores.details["collapse"][1].isnan())
