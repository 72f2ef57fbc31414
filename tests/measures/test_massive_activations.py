"""Massive activations: the detector on real, tiny and planted models, and the two interventions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import MassiveActivations, Measure
from attnbias.measures.massive_activations import Massive
from tests.cases.measure import Maps, MeasureCase
from tests.measures.plain import blocks, states
from tests.steer import models
from tests.steer.models import Subject

RATIO = 6.0  # of the small models here


class TestMassiveActivations(MeasureCase):
    def build(self, subject: Subject) -> Measure:
        return MassiveActivations(size=0.5, ratio=RATIO)

    def values(self, result: Massive) -> Tensor:
        """The largest, the median, and where the massive ones are, by number and by sums."""
        counts = torch.zeros(result.samples, len(result.layers), 4, dtype=torch.float64)
        for one in result.found:
            row = counts[one.sample, result.layers.index(one.layer)]
            row += torch.tensor([1.0, one.position, one.dimension, one.value])
        return torch.cat([result.largest, result.median[..., None], counts], -1)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        found = []
        for row in states(subject).transpose(0, 1):
            line = []
            for layer in row:
                flat = sorted(abs(x) for x in layer.flatten().tolist())
                middle = flat[(len(flat) - 1) // 2]  # the lower of the two in the middle
                least = max(0.5, RATIO * middle)
                hits = [
                    (token, dimension, value)
                    for token, values in enumerate(layer.tolist())
                    for dimension, value in enumerate(values)
                    if abs(value) > least
                ]
                sums = [sum(column) for column in zip(*hits, strict=True)] if hits else [0.0] * 3
                line.append([*flat[:-4:-1], middle, len(hits), *sums])
            found.append(line)
        return torch.tensor(found, dtype=torch.float64)


def planted(dimension: int = 5, first: float = 9000.0, later: float = -4000.0) -> Subject:
    """A decoder whose second MLP writes a massive entry at token 0 and at every token 7."""
    subject = models.MAKERS["mistral"]()
    ids = subject.inputs["input_ids"]
    ids[ids == 7] = 8
    ids[0, 4] = ids[1, 9] = 7

    def write(module: nn.Module, given: object, out: Tensor) -> Tensor:
        out = out.clone()
        out[:, 0, dimension] = first
        places = inputs_now["ids"] == 7
        out[..., dimension] = torch.where(places, later, out[..., dimension])
        return out

    inputs_now = {"ids": ids}
    subject.model.register_forward_pre_hook(
        lambda module, args, kwargs: inputs_now.update(ids=kwargs["input_ids"]), with_kwargs=True
    )
    blocks(subject.model)[1].get_submodule("mlp").register_forward_hook(write)
    return subject


def test_finds_what_was_planted_with_the_published_thresholds() -> None:
    subject = planted()
    found = MassiveActivations().measure(subject.model, [subject.inputs])
    after = [one for one in found.found if one.layer == 1]
    places = {(one.sample, one.position, one.dimension) for one in after}
    assert places == {(0, 0, 5), (0, 4, 5), (1, 0, 5), (1, 9, 5)}
    assert found.span == (1, 2)  # the residual stream carries them on
    assert set(found.dimensions) == {5}
    assert found.means(1)[5] == pytest.approx((9000.0, -4000.0), abs=50.0)
    assert found.means(0) == {}
    assert "in dimensions 5" in str(found)


@pytest.mark.parametrize(
    ("size", "ratio"), [(1e4, 10.0), (100.0, 1e6)], ids=["too small", "not far out"]
)
def test_both_thresholds_count(size: float, ratio: float) -> None:
    subject = planted()
    found = MassiveActivations(size, ratio).measure(subject.model, [subject.inputs])
    assert not found.found
    assert found.span is None
    assert "No massive activation" in str(found)
    with pytest.raises(AttnbiasError, match="nothing to replace"):
        found.replacing("zero")


def test_replacing_by_mean_changes_nothing_and_by_zero_does() -> None:
    subject = planted()
    found = MassiveActivations().measure(subject.model, [subject.inputs])
    other = {"input_ids": subject.inputs["input_ids"].flip(0)}
    with torch.no_grad():
        plain = subject.model(**other).logits
        with ab.steer(subject.model, found.replacing("mean")):
            same = subject.model(**other).logits
        with ab.steer(subject.model, found.replacing("zero")):
            zero = subject.model(**other).logits
    assert float((same - plain).abs().max()) < 0.02
    assert float((zero - plain).abs().max()) > 0.1


def test_replacing_touches_only_massive_entries_of_known_dimensions() -> None:
    subject = planted()
    found = MassiveActivations().measure(subject.model, [subject.inputs])
    kept: list[Tensor] = []
    handle = blocks(subject.model)[2].register_forward_pre_hook(
        lambda module, args: kept.append(args[0].clone())
    )
    with torch.no_grad():
        subject.model(**subject.inputs)
        with ab.steer(subject.model, found.replacing("zero")):
            subject.model(**subject.inputs)
    handle.remove()
    changed = (kept[0] != kept[1]).nonzero().tolist()
    assert sorted(map(tuple, changed)) == [(0, 0, 5), (0, 4, 5), (1, 0, 5), (1, 9, 5)]
    assert not kept[1][0, 0, 5]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_it(stories: object, side: str) -> None:
    subject = models.stories(stories)  # type: ignore[arg-type]
    ids, mask = subject.inputs["input_ids"][:1], torch.ones(1, 13, dtype=torch.long)
    pad = {"left": (4, 0), "right": (0, 4)}[side]
    padded = {
        "input_ids": nn.functional.pad(ids, pad),
        "attention_mask": nn.functional.pad(mask, pad),
    }
    measure = MassiveActivations(size=0.0, ratio=RATIO)
    alone = measure.measure(subject.model, [{"input_ids": ids}])
    beside = measure.measure(subject.model, [padded])
    assert torch.allclose(alone.largest, beside.largest, atol=1e-4)
    assert torch.allclose(alone.median, beside.median, atol=1e-5)
    assert [one.position for one in alone.found] == [one.position for one in beside.found]


def test_bad_parameters_are_named() -> None:
    with pytest.raises(AttnbiasError, match="size"):
        MassiveActivations(size=-1.0)
    with pytest.raises(AttnbiasError, match="ratio"):
        MassiveActivations(ratio=math.inf)
    with pytest.raises(AttnbiasError, match="count"):
        MassiveActivations(count=0)
    subject = models.MAKERS["vit"]()
    with pytest.raises(Refused, match="no tower 'text'"):
        MassiveActivations(tower="text").measure(subject.model, [subject.inputs])
    found = MassiveActivations().measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="zero"):
        found.replacing("none")  # type: ignore[arg-type]
