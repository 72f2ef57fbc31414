"""AdaptiveHeads beside loops over eager maps; its estimate where the normal model holds exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.measures import AdaptiveHeads, Measure, moments_of
from attnbias.measures.adaptive_heads import Moments, _Scored
from attnbias.observe.observer import Observer
from tests.cases.measure import Maps, MeasureCase
from tests.observe.calls import FakeCall
from tests.steer import models
from tests.steer.models import Subject

SINKS, WINDOW, LENGTH = 2, 3, 24


class TestAdaptiveHeads(MeasureCase):
    """Scores of a row count from their log-sum-exp: they are the logarithms of the eager map."""

    subjects = ("stories", "mistral", "minilm", "llava")
    padding: str | None = None
    tolerance = 1e-4  # scores of sharpened heads in float32, squared

    def build(self, subject: Subject) -> Measure:
        return AdaptiveHeads(sinks=SINKS, window=WINDOW, threshold=0.7)

    def values(self, result: Any) -> Tensor:
        return torch.stack([result.estimated, result.exact])

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        given = dict(subject.inputs)
        if subject.name != "llava":
            ids = models.tokens(2, LENGTH) + (1000 if subject.name == "minilm" else 0)
            mask = torch.ones_like(ids)
            if self.padding == "left":
                mask[1, :5] = 0
            if self.padding == "right":
                mask[1, -5:] = 0
            given = {"input_ids": ids, "attention_mask": mask}
        return [given]

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if self.padding:  # rows of their own, cut to their length, would be shorter
            return [given]
        return [{w: v[n : n + 1] for w, v in given.items()} for n in range(2)]

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (given,) = self.data(subject)
        layers = precise_maps(subject, given)
        batch, heads, length, _ = layers[0].shape
        mask = given.get("attention_mask", torch.ones(batch, length)).bool()
        both = torch.full((2, batch, len(layers), heads, length), torch.nan, dtype=torch.float64)
        for row in range(batch):
            for layer, p in enumerate(layers):
                for head in range(heads):
                    own = p[row, head][mask[row]][:, mask[row]]
                    for i, line in enumerate(own.tolist()):
                        both[:, row, layer, head, i] = torch.tensor(by_hand(i, line))
        return both


def precise_maps(subject: Subject, given: Mapping[str, Any]) -> list[Tensor]:
    """Eager maps in float64: in float32 a small weight is zero, and says nothing of its score."""
    twin = subject.eager().double()
    inputs = {w: v.double() if v.is_floating_point() else v for w, v in given.items()}

    def softmax(scores: Tensor, dim: int, dtype: Any = None) -> Tensor:
        return scores.double().softmax(dim)

    with torch.no_grad(), mock.patch("torch.nn.functional.softmax", softmax):
        return list(twin(**inputs, output_attentions=True).attentions)


def by_hand(i: int, line: list[float]) -> tuple[float, float]:
    """The estimated and the exact local share of one row of a map."""
    local = {j for j in range(len(line)) if j < SINKS or abs(i - j) < WINDOW}
    bulk = [p for j, p in enumerate(line) if j not in local and p > 0]
    mass = sum(line[j] for j in local)
    if not bulk:
        return 1.0, 1.0
    logs = [math.log(p) for p in bulk]
    mean = sum(logs) / len(logs)
    spread = sum((x - mean) ** 2 for x in logs) / len(logs)
    guess = len(bulk) * math.exp(min(mean + spread / 2, 700.0))  # beyond any double: share 0
    return mass / (mass + guess), mass / (mass + sum(bulk))


class TestAdaptiveHeadsLeftPadded(TestAdaptiveHeads):
    subjects = ("stories", "mistral")
    padding = "left"


class TestAdaptiveHeadsRightPadded(TestAdaptiveHeads):
    subjects = ("stories", "minilm")
    padding = "right"


def test_decisions_and_their_agreement(request: pytest.FixtureRequest) -> None:
    case = TestAdaptiveHeads()
    subject = models.make("stories", request)
    found = AdaptiveHeads(sinks=SINKS, window=WINDOW, threshold=0.7).measure(
        subject.model, case.data(subject)
    )
    want = (found.estimated < 0.7).double().mean(-1)
    torch.testing.assert_close(found.samples, want)
    torch.testing.assert_close(found.control, (found.exact < 0.7).double().mean(-1))
    said, true = (found.estimated < 0.7).flatten(), (found.exact < 0.9).flatten()
    got = found.agreement(0.7, 0.9)
    assert got["accuracy"] == pytest.approx(float((said == true).double().mean()))
    assert got["recall"] == pytest.approx(float((said & true).sum() / true.sum()))
    assert got["precision"] == pytest.approx(float((said & true).sum() / said.sum()))
    assert 0 < got["local"] < 1


def normal_call(spread: float) -> FakeCall:
    """One head whose keys are drawn from a known normal distribution."""
    generator = torch.Generator().manual_seed(4)
    query = torch.randn(1, 1, 4000, 8, generator=generator)
    key = 0.5 + spread * torch.randn(1, 1, 4000, 8, generator=generator)
    positions = torch.arange(4000)[None]
    return FakeCall(query, key, ab.Causal(4000, 4000), positions, positions)


@pytest.mark.parametrize("known", [False, True], ids=["from the prompt", "known moments"])
def test_the_bulk_of_normal_keys_is_estimated(known: bool) -> None:
    """log of the estimate less log of the exact bulk mass: a mean error under 0.02 nats."""
    call = normal_call(0.7)
    moments = {0: Moments(torch.full((1, 8), 0.5), 0.49 * torch.eye(8)[None])} if known else None
    measure = AdaptiveHeads(moments=moments)
    statistic = _Scored(16, 112, moments)
    observer = Observer([statistic])
    observer.see(call, None, call.query, None)  # type: ignore[arg-type]
    part = observer.seen.tensor("scored").values[0, 0][:, None, :, 2000:]
    error = measure._bulk(part).log() - part[..., 1].log()
    assert float(error.mean().abs()) < 0.02
    assert float(error.std()) < 0.1


def test_moments_of_another_prompt(request: pytest.FixtureRequest) -> None:
    """Given moments give the quadratic form, by hand from the eager twin's queries and keys."""
    subject = models.make("stories", request)
    ids = models.tokens(1, 40, seed=7)
    moments = moments_of(subject.model, {"input_ids": ids}, sinks=SINKS)
    with torch.no_grad():
        cache = subject.model(ids, use_cache=True).past_key_values
    keys = cache.layers[1].keys[0, :, SINKS:].double()
    mean = keys.mean(1)
    spread = torch.stack([torch.cov(k.T, correction=0) for k in keys])
    torch.testing.assert_close(moments[1].mean, mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(moments[1].covariance, spread, atol=1e-5, rtol=1e-5)
    # The text's own keys as the other prompt: the last query sees all of them but its window.
    text = {"input_ids": models.tokens(1, 40, seed=7)}
    own = AdaptiveHeads(sinks=SINKS, window=1).measure(subject.model, [text])
    other = AdaptiveHeads(sinks=SINKS, window=1, moments=moments).measure(subject.model, [text])
    near = (own.estimated - other.estimated)[..., -1].abs()
    far = (own.estimated - other.estimated)[..., SINKS + 1].abs()
    assert float(near.mean()) < 0.05 < float(far.mean())
    with pytest.raises(AttnbiasError, match="at least"):
        moments_of(subject.model, {"input_ids": ids[:, :3]}, sinks=SINKS)


@pytest.mark.parametrize(
    ("bad", "word"), [({"sinks": -1}, "sinks"), ({"window": 0}, "window"), ({"threshold": 0}, "th")]
)
def test_bad_numbers(bad: dict[str, Any], word: str) -> None:
    with pytest.raises(AttnbiasError, match=word):
        AdaptiveHeads(**bad)
