"""Lag-CRP, serial-position curve and predictions of a list that is read again in another order."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import EpisodicMemory, Measure
from tests.cases.measure import Maps, MeasureCase, eager_maps
from tests.steer import models
from tests.steer.models import Subject

LENGTH, LAGS, COUNT = 10, 3, 3


def curves(subject: Subject, measure: EpisodicMemory) -> tuple[Tensor, Tensor, Tensor]:
    """By loops over whole maps: samples, profile, serial-position curve."""
    probes, order, start = measure.probes(subject.model)
    (layers,) = eager_maps(subject, {"input_ids": probes}).values()
    shape = (len(probes), len(layers), layers[0].shape[1])
    profile, serial = torch.zeros(*shape, 2 * LAGS + 1), torch.zeros(*shape, LENGTH)
    profile, serial = profile.double(), serial.double()
    for row, ids in enumerate(probes.tolist()):
        counts = torch.zeros(2 * LAGS + 1).double()
        for query in range(start + LENGTH, len(ids)):
            match = ids[start : start + LENGTH].index(ids[query])
            assert match == int(order[row, query - start - LENGTH])
            for n, layer in enumerate(layers):
                whole = layer[row, :, query]
                serial[row, n] += whole[:, start : start + LENGTH] / LENGTH
                for lag in range(-LAGS, LAGS + 1):
                    if 0 <= match + lag < LENGTH:
                        profile[row, n, :, lag + LAGS] += whole[:, start + match + lag]
            counts += torch.tensor([0 <= match + lag < LENGTH for lag in range(-LAGS, LAGS + 1)])
        profile[row] /= counts
    return profile[..., LAGS + 1], profile.mean(0), serial.mean(0)


class TestEpisodicMemory(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral", "llava", "minilm")
    needs_data: ClassVar[bool] = False

    def build(self, subject: Subject) -> EpisodicMemory:
        return EpisodicMemory(LENGTH, LAGS, COUNT)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        return curves(subject, self.build(subject))[0]


def test_details(stories: Any) -> None:
    subject = models.stories(stories)
    measure: Measure = EpisodicMemory(LENGTH, LAGS, COUNT)
    assert isinstance(measure, EpisodicMemory)
    scores = measure.measure(subject.model)
    _, profile, serial = curves(subject, measure)
    details = scores.details
    assert torch.allclose(details["profile"], profile, atol=1e-5)
    assert torch.allclose(details["serial"], serial, atol=1e-5)
    assert torch.allclose(details["asymmetry"], profile[..., 4] - profile[..., 2], atol=1e-5)
    far = profile[..., [0, 1, 5, 6]].mean(-1)
    near = (profile[..., 4] + profile[..., 2]) / 2
    assert torch.allclose(details["contiguity"], near - far, atol=1e-5)
    middle = serial[..., 1:-1].mean(-1)
    assert torch.allclose(details["primacy"], serial[..., 0] - middle, atol=1e-5)
    assert torch.allclose(details["recency"], serial[..., -1] - middle, atol=1e-5)
    probes, order, start = measure.probes(subject.model)
    assert sorted(order[0].tolist()) == list(range(LENGTH))
    assert order[0].tolist() != order[1].tolist()
    with torch.no_grad():
        chance = subject.model(probes).logits.double().softmax(-1)
    want = []
    for lag in range(-LAGS, LAGS + 1):
        rows = []
        for row in range(COUNT):
            each = [
                chance[row, start + LENGTH + n, probes[row, start + place + lag]]
                for n, place in enumerate(order[row].tolist())
                if 0 <= place + lag < LENGTH
            ]
            rows.append(torch.stack(each).mean())
        want.append(torch.stack(rows).mean())
    assert torch.allclose(details["said"], torch.stack(want), atol=1e-5)


def test_inside_steer_it_measures_the_edited_model(stories: Any) -> None:
    model = models.stories(stories).model
    measure = EpisodicMemory(LENGTH, LAGS, COUNT)
    plain = measure.measure(model)
    with ab.steer(model, ab.rules.BlockHeads(heads=((0, 0), (0, 1), (1, 2)))):
        without = measure.measure(model)
    assert torch.equal(without.samples[:, 0], plain.samples[:, 0])  # layer 0 attends as before
    assert not torch.allclose(without.samples[:, 2], plain.samples[:, 2], atol=1e-4)
    assert not torch.allclose(without.details["said"], plain.details["said"], atol=1e-5)
    assert torch.equal(measure.measure(model).samples, plain.samples)


def test_what_it_refuses() -> None:
    for given in ({"length": 9}, {"lags": 1}, {"lags": 500}, {"count": 0}):
        with pytest.raises(AttnbiasError, match=next(iter(given))):
            EpisodicMemory(**given)
    subject = models.mistral()
    with pytest.raises(AttnbiasError, match="leave data out"):
        EpisodicMemory(LENGTH, LAGS).measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="reads 64"):
        EpisodicMemory().measure(subject.model)
    with pytest.raises(Refused, match="one tower of text"):
        EpisodicMemory(LENGTH, LAGS).measure(models.bart("encoder").model)
