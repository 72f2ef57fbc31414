"""The sink metric against eager maps, on made maps in closed form, and on cut texts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, SinkMetric
from tests.cases.measure import Maps, MeasureCase, eager_maps
from tests.steer import models
from tests.steer.models import Subject

EPSILON, CUT = 0.2, 9


def alpha(maps: list[Tensor], causal: bool) -> Tensor:
    """(batch, layers, heads, keys) by loops: the mean of each column over the queries that see."""
    whole = torch.stack(maps, 1)
    columns = [
        whole[..., (k if causal else 0) :, k].mean(-1) for k in range(whole.shape[-1])
    ]  # fmt: skip
    return torch.stack(columns, -1)


class TestSinkMetric(MeasureCase):
    token: ClassVar[int] = 0

    def build(self, subject: Subject) -> Measure:
        return SinkMetric(threshold=EPSILON, token=self.token)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (layers,) = maps.values()
        return (alpha(layers, subject.causal)[..., self.token] > EPSILON).double()


class TestSinkMetricOfTheSixthToken(TestSinkMetric):
    token = 5


class TestSinkMetricBelowTheCut(TestSinkMetric):
    subjects = ("minilm", "stories")

    def build(self, subject: Subject) -> Measure:
        return SinkMetric(threshold=EPSILON, length=CUT)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        short = {name: value[:, :CUT] for name, value in subject.inputs.items()}
        return super().dense(subject, eager_maps(subject, short))


def test_sink_of_every_token_and_the_mean_received(stories: Any) -> None:
    subject = models.stories(stories)
    found = SinkMetric(threshold=EPSILON).measure(subject.model, [subject.inputs])
    whole = alpha(eager_maps(subject)["text"], causal=True)
    sinks = (whole > EPSILON).double().mean((0, 1, 2))
    assert torch.allclose(found.details["by_token"], sinks, atol=1e-9)
    assert torch.allclose(found.details["alpha"], whole.mean(0), atol=1e-5)
    assert found.details["metric"] == pytest.approx(float(sinks[0]))
    assert 0 < float(sinks[0]) < 1  # sharpened heads: neither none nor all


def test_a_map_that_is_known() -> None:
    """Heads of a decoder whose scores are zero attend evenly: alpha_k is a harmonic sum."""
    subject = models.MAKERS["mistral"]()
    model = subject.model
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features == 32:
                module.weight.zero_()
    ids = subject.inputs["input_ids"][:1, :6]  # within the window
    found = SinkMetric().measure(model, [{"input_ids": ids}]).details["alpha"]
    want = [sum(1 / (i + 1) for i in range(k, 6)) / (6 - k) for k in range(6)]
    assert torch.allclose(found, torch.tensor(want, dtype=torch.float64).expand(3, 4, 6))
    # The first token gets 0.408 of an even map of six tokens and the second 0.29.
    assert SinkMetric().measure(model, [{"input_ids": ids}]).details["by_token"][:2].tolist() == [
        1.0,
        0.0,
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_move_the_cut(stories: Any, side: str) -> None:
    subject = models.stories(stories)
    ids = subject.inputs["input_ids"]
    long, short = ids[:1], ids[1:, :11]
    pad = (2, 0) if side == "left" else (0, 2)
    both = {
        "input_ids": torch.cat([long, nn.functional.pad(short, pad)]),
        "attention_mask": torch.cat(
            [torch.ones_like(long), nn.functional.pad(torch.ones_like(short), pad)]
        ),
    }
    measure = SinkMetric(threshold=EPSILON, length=CUT)
    together = measure.measure(subject.model, [both])
    alone = measure.measure(
        subject.model, [{"input_ids": long[:, :CUT]}, {"input_ids": short[:, :CUT]}]
    )
    assert torch.equal(together.samples, alone.samples)
    assert torch.allclose(together.details["alpha"], alone.details["alpha"], atol=1e-5)


def test_bad_parameters_are_named(stories: Any) -> None:
    for bad in ({"threshold": 1.5}, {"token": -1}, {"length": 0}):
        with pytest.raises(AttnbiasError, match=next(iter(bad))):
            SinkMetric(**bad)
    subject = models.stories(stories)
    with pytest.raises(AttnbiasError, match="no text has a token 20"):
        SinkMetric(token=20).measure(subject.model, [subject.inputs])
