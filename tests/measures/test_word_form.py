"""Scrambled words: how they are made, and what is measured, beside whole eager maps."""

from __future__ import annotations

import copy
import random
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, WordForm
from attnbias.measures.typos import candidates, scramble, variants
from tests.cases.measure import Maps, MeasureCase
from tests.measures.words import pieces
from tests.steer import models
from tests.steer.models import Subject

TEXTS = (
    "The old lighthouse keeper told extraordinary stories about the great storm of that year",
    "Nothing here is long",
    "Understanding came late to them all and nobody had complained",
)


class TestWordForm(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories")
    needs_data = False
    tolerance = 4e-5
    blank = 0.0

    def build(self, subject: Subject) -> Measure:
        return WordForm(
            TEXTS, pieces(subject.name), ratios=(0.0, 0.5, 1.0), blank=self.blank, whole=False
        )

    def values(self, result: Any) -> Tensor:
        parts = (result.similarity, result.own, result.context, result.divergence)
        return torch.cat([part.flatten() for part in parts])

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        twin: Any = copy.deepcopy(subject.model).double()
        twin.set_attn_implementation("eager")
        measure = self.build(subject)
        assert isinstance(measure, WordForm)
        near, own, context, far = [], [], [], []
        for intact, scrambled in measure.samples():
            seen = []
            for typo in (intact, *scrambled):
                whole = pieces(subject.name)(typo.text, return_offsets_mapping=True)
                inside = [
                    n
                    for n, (a, b) in enumerate(whole["offset_mapping"])
                    if typo.start <= a and b <= typo.stop and b > a
                ]
                ids = torch.tensor([whole["input_ids"]])
                with torch.no_grad():
                    out = twin(ids, output_hidden_states=True, output_attentions=True)
                seen.append((out, inside))
            for out, inside in seen[1:]:
                end, want = inside[-1], seen[0]
                for states, other in zip(out.hidden_states, want[0].hidden_states, strict=True):
                    a, b = states[0, end], other[0, want[1][-1]]
                    near.append(float(a @ b / (a.norm() * b.norm())))
                own += [p[0, :, end, inside].sum(-1) for p in out.attentions]
                context += [p[0, :, end, : inside[0]].sum(-1) for p in out.attentions]
                if subject.name == "minilm":
                    far.append(float("nan"))
                    continue
                p, q = (o.logits[0, -1].softmax(-1) for o in (want[0], out))
                far.append(float((p * (p / q).log()).sum()))
        parts = [torch.tensor(near), torch.cat(own).double(), torch.cat(context).double()]
        return torch.cat([*parts, torch.tensor(far)]).double()


class TestWordFormWithBlanks(TestWordForm):
    blank = 0.6


def test_letters_are_scrambled_inside_a_word() -> None:
    word = "extraordinary"
    for seed in range(30):
        dice = random.Random(seed)
        assert scramble(word, 0.0, dice) == word
        for ratio, most in ((0.25, 2), (0.5, 5), (0.75, 8), (1.0, 11)):
            found = scramble(word, ratio, dice)
            assert found != word
            assert (found[0], found[-1], sorted(found)) == (word[0], word[-1], sorted(word))
            changed = [n for n in range(13) if found[n] != word[n]]
            assert changed[-1] - changed[0] < most
    assert scramble("aaaaaaaaaaaa", 1.0, random.Random(0)) == "aaaaaaaaaaaa"


def test_which_words_are_taken() -> None:
    tokenizer = pieces("minilm")
    assert candidates(TEXTS[0], tokenizer, 10, False) == [5]
    assert candidates(TEXTS[0], tokenizer, 9, False) == [5]  # the other one is not in the middle
    assert candidates(TEXTS[2], tokenizer, 10, False) == [0]  # "complained" has ten letters
    assert candidates(TEXTS[2], tokenizer, 9, False) == [0, 9]
    assert candidates(TEXTS[1], tokenizer, 10, False) == []
    assert candidates("extraordinary " * 2 + "things", tokenizer, 10, False) == []
    assert candidates(TEXTS[0], tokenizer, 10, True) == []  # five pieces
    assert candidates("so unbelievable, they", tokenizer, 10, False) == []


def test_blanks_are_the_same_for_all_ratios() -> None:
    intact, scrambled = variants(TEXTS[0], 5, (0.0, 1.0), 0.5, random.Random(1))
    assert intact.word == "extraordinary"
    assert intact.text.split().count("_") == 6
    assert scrambled[0] == intact
    assert scrambled[1].text.replace(scrambled[1].word, intact.word) == intact.text


def test_what_the_samples_say_together(request: pytest.FixtureRequest) -> None:
    subject = models.make("stories", request)
    measure = WordForm(TEXTS, pieces("stories"), whole=False)
    found = measure.measure(subject.model)
    assert len(found.words) == 2
    assert torch.allclose(found.similarity[:, 0], torch.ones(()).double())
    assert float(found.divergence[:, 0].abs().max()) < 1e-9
    assert torch.allclose(found.curve, found.own.sum(-1).mean(0))
    counts = ((found.own[:, 2] > found.context[:, 2]).sum(1) >= 2).double().mean(0)
    assert torch.equal(found.form_heads(0.5), counts)
    assert found.scores(0.5).samples.shape == (2, 5, 8)
    assert found.opposed(0.0) == 0.0
    rates = []
    for sample in range(2):
        near, far = found.similarity[sample, :, -1].tolist(), found.divergence[sample].tolist()
        pairs = [(0, 2), (1, 3), (2, 4)]
        rates.append(
            sum((near[a] - near[b]) * (far[a] - far[b]) < 0 for a, b in pairs) / len(pairs)
        )
    assert found.opposed(0.5) == pytest.approx(sum(rates) / 2)
    with pytest.raises(AttnbiasError, match="apart"):
        found.opposed(0.3)
    with pytest.raises(AttnbiasError, match="ratio must be one of"):
        found.scores(0.3)


def test_bad_input(request: pytest.FixtureRequest) -> None:
    tokenizer = pieces("stories")
    with pytest.raises(AttnbiasError, match="between 0 and 1"):
        WordForm(TEXTS, tokenizer, ratios=(2.0,))
    with pytest.raises(AttnbiasError, match="letters"):
        WordForm(TEXTS, tokenizer, letters=1)
    subject = models.make("stories", request)
    with pytest.raises(AttnbiasError, match="a single token when intact"):
        WordForm(TEXTS, tokenizer).measure(subject.model)
    with pytest.raises(AttnbiasError, match="give no data"):
        WordForm(TEXTS, tokenizer).measure(subject.model, [subject.inputs])
