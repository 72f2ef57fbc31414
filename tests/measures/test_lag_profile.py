"""Lag profiles and the fit of CMR to them."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import CMR, LagProfile, Measure
from tests.cases.measure import Maps, MeasureCase, eager_maps
from tests.steer import models
from tests.steer.models import Subject

LENGTH, LAGS = 9, 3
SMALL = CMR(betas=2, gammas=1, items=40, starts=4, recalls=25)


def profiles(subject: Subject, probes: Tensor, start: int) -> Tensor:
    """By loops over whole maps: ``(lists, layers, heads, lags)``."""
    (layers,) = eager_maps(subject, {"input_ids": probes}).values()
    found = []
    for row, ids in enumerate(probes.tolist()):
        values: dict[int, list[Tensor]] = {lag: [] for lag in range(-LAGS, LAGS + 1)}
        for query in range(start + LENGTH, len(ids)):
            match = next(n for n in range(start, query) if ids[n] == ids[query])
            for lag, kept in values.items():
                if start <= match + lag < start + LENGTH:
                    kept.append(torch.stack([p[row, :, query, match + lag] for p in layers]))
        found.append(torch.stack([torch.stack(kept).mean(0) for kept in values.values()], -1))
    return torch.stack(found)


class TestLagProfile(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral", "gpt_oss", "llava", "minilm")
    needs_data: ClassVar[bool] = False

    def build(self, subject: Subject) -> Measure:
        return LagProfile(length=LENGTH, lags=LAGS, count=5)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        measure = self.build(subject)
        assert isinstance(measure, LagProfile)
        return profiles(subject, *measure.probes(subject.model))[..., LAGS + 1]


class TestLikeCMR(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("stories",)
    needs_data: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3  # a distance is relative to a variance, which may be small

    def build(self, subject: Subject) -> Measure:
        return LagProfile("cmr", LENGTH, LAGS, 3, model=SMALL)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        measure = self.build(subject)
        assert isinstance(measure, LagProfile)
        shown = profiles(subject, *measure.probes(subject.model)).mean(0)
        found = torch.zeros(shown.shape[:2], dtype=torch.float64)
        for layer, head in torch.cartesian_prod(*map(torch.arange, shown.shape[:2])).tolist():
            own = shown[layer, head] - shown[layer, head].min()
            errors = []
            for point in SMALL.grid.tolist():
                curve = SMALL.curve(*point)[8 - LAGS : 9 + LAGS]
                curve = (curve - curve.min()) / (curve.max() - curve.min()) * own.max()
                errors.append(float(((curve - own) ** 2).mean() / own.var(unbiased=False)))
            found[layer, head] = -min(errors)
        return found[None]


def test_details(stories: Any) -> None:
    subject = models.stories(stories)
    measure = LagProfile(length=LENGTH, lags=LAGS, count=3)
    scores = measure.measure(subject.model)
    want = profiles(subject, *measure.probes(subject.model))
    assert torch.allclose(scores.details["profile"], want.mean(0), atol=1e-5)
    assert torch.allclose(scores.details["profile_error"], want.std(0) / 3**0.5, atol=1e-5)
    assert scores.details["lags"] == [-3, -2, -1, 0, 1, 2, 3]


def test_a_curve_is_that_of_recalls_one_by_one() -> None:
    """A plain walk with the matrices of the paper, by an inverse as it gives them."""
    items, beta_enc, beta_rec, gamma = 40, 0.4, 0.6, 0.5
    shift = torch.diag(torch.ones(items, dtype=torch.float64), 1)
    whole = torch.linalg.inv(torch.eye(items + 1).double() - (1 - beta_enc) * shift) @ shift
    generator = torch.Generator().manual_seed(3)
    curves = []
    for start in range(4):
        shares = []
        for _ in range(120):
            context = torch.eye(items + 1).double()[start]
            last, counts, made = start, torch.zeros(17).double(), 0
            for _ in range(100):
                item = int(torch.multinomial(whole.T @ context, 1, generator=generator))
                if item == items:
                    break
                made += 1
                if abs(item - last) <= 8:
                    counts[item - last + 8] += 1
                incoming = (1 - gamma) * torch.eye(items + 1).double()[item]
                incoming = incoming + gamma * whole[:, item]
                context = (1 - beta_rec) * context + beta_rec * incoming / incoming.norm()
                context, last = context / context.norm(), item
            if made:
                shares.append(counts / made)
        curve = torch.stack(shares).mean(0)
        curves.append(curve / curve.sum())
    found = CMR(items=items, starts=4, recalls=120).curve(beta_enc, beta_rec, gamma)
    assert float((found - torch.stack(curves).mean(0)).abs().max()) < 0.025


def test_curves_without_chance() -> None:
    sure = CMR().curve(1.0, 1.0, 0.0)  # the next item, always
    assert float(sure[9]) == 1.0
    ahead = CMR(recalls=400).curve(0.5, 1.0, 0.0)[9:12]
    assert torch.allclose(ahead, torch.tensor([0.5, 0.25, 0.125]).double(), atol=0.03)


def test_parameters_are_recovered() -> None:
    model = CMR(betas=5, gammas=2)
    for truth in ((0.4, 0.6, 0.5), (0.2, 0.8, 0.0), (0.6, 0.4, 1.0)):
        shown = CMR(seed=9, recalls=200).curve(*truth)[3:14]
        distance, point = model.distance(0.3 * shown + 0.01)  # neither shift nor scale matters
        assert float(distance) < 0.01
        assert torch.allclose(point, torch.tensor(truth).double(), atol=1e-9)


def test_which_heads_are_like_cmr() -> None:
    flat, ahead, back = torch.ones(3, 11).double().unbind()
    ahead, back = torch.eye(11)[6].double(), torch.eye(11)[4].double()
    distance, point = SMALL.distance(torch.stack([ahead, back, flat]))
    assert float(distance[0]) < 1e-9
    assert float(distance[1]) > 1
    assert bool(distance[2].isnan())
    assert bool(point[2].isnan().all())


def test_what_it_refuses() -> None:
    for given in ({"length": 1}, {"lags": 0}, {"lags": 9}, {"count": 0}, {"score": "best"}):
        with pytest.raises(AttnbiasError, match=next(iter(given))):
            LagProfile(**given)  # type: ignore[arg-type]
    with pytest.raises(AttnbiasError, match="betas"):
        CMR(betas=0)
    with pytest.raises(AttnbiasError, match="each side"):
        SMALL.distance(torch.zeros(4))
    subject = models.mistral()
    with pytest.raises(AttnbiasError, match="leave data out"):
        LagProfile().measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="reads 64"):
        LagProfile().measure(subject.model)
    with pytest.raises(Refused, match="one tower of text"):
        LagProfile(length=4, lags=2).measure(models.bart("encoder").model)
