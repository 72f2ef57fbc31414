"""Mixing: the spread of a change by plain forwards, and the bound against true Jacobians."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, Mixing
from attnbias.measures._maps import attention_maps
from attnbias.measures.mixing import Mixed
from experiments._triggers import texts, trained
from tests.cases.measure import Maps, MeasureCase, eager_maps
from tests.measures.plain import states
from tests.steer import models
from tests.steer.models import Subject


class TestMixing(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories", "llava")
    place: ClassVar[int] = 7
    sink: ClassVar[int] = 0
    tolerance = 2e-5

    def build(self, subject: Subject) -> Measure:
        return Mixing(position=self.place, replacement=40, sink=self.sink)

    def values(self, result: Mixed) -> Tensor:
        return torch.stack([result.change, result.bound])

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        ids = subject.inputs["input_ids"]
        other = ids.clone()
        other[:, self.place] = 40
        mask = torch.ones_like(ids)
        hidden = mask.clone()
        hidden[:, self.sink] = 0
        changes, bounds = [], []
        for one in (mask, hidden):
            before = states(subject, {**subject.inputs, "attention_mask": one})
            after = states(subject, {**subject.inputs, "attention_mask": one, "input_ids": other})
            changes.append(((after - before).norm(dim=-1) / before.norm(dim=-1)).movedim(0, 1))
            (layers,) = eager_maps(subject, {**subject.inputs, "attention_mask": one}).values()
            product = torch.eye(ids.shape[1], dtype=torch.float64)
            line = []
            for p in layers:
                step = p.sum(1) * one[:, :, None]  # the hidden token's own row does not count
                product = (step + torch.eye(ids.shape[1], dtype=torch.float64)) @ product
                line.append(product[:, :, self.place])
            bounds.append(torch.stack(line, 1))
        found = torch.stack([torch.stack(changes, 1), torch.stack(bounds, 1)])
        found[..., [self.place, self.sink]] = torch.nan
        if subject.causal:
            found[..., : self.place] = torch.nan
        return found


class TestMixingWithoutAnotherToken(TestMixing):
    sink = 3
    subjects = ("stories",)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_it(stories: Any, side: str) -> None:
    subject = models.stories(stories)
    ids = subject.inputs["input_ids"][:1]
    pad = {"left": (4, 0), "right": (0, 4)}[side]
    padded = {
        "input_ids": nn.functional.pad(ids, pad),
        "attention_mask": nn.functional.pad(torch.ones_like(ids), pad),
    }
    measure = Mixing()
    alone = measure.measure(subject.model, [{"input_ids": ids}])
    beside = measure.measure(subject.model, [padded])
    assert alone.positions == beside.positions == (6,)
    for one, other in ((alone.change, beside.change), (alone.bound, beside.bound)):
        assert torch.allclose(one, other, atol=1e-4, equal_nan=True)


def test_a_change_spreads_further_without_the_sink() -> None:
    model = trained(0, "softmax", 240)
    data = [{"input_ids": texts(12, torch.Generator().manual_seed(3))}]
    sink = Mixing().measure(model, data)
    other = Mixing(sink=5).measure(model, data)
    first, second = sink.spread[..., 0].mean(0).tolist()
    assert second > 3 * first
    assert float(other.spread[:, 1].mean()) == pytest.approx(first, rel=0.1)
    low, high = sink.bound[:, :, 0].nanmean((0, 2)).tolist()
    assert high > 1.4 * low
    assert "without it" in str(sink)


def test_the_bound_holds_for_true_jacobians(stories: Any) -> None:
    """Layers with this attention, maps of norm at most 1 and ReLU: C is then 1 in each of them."""
    subject = models.stories(stories)
    ids = subject.inputs["input_ids"][:1]
    _, maps = attention_maps(subject.model, {"input_ids": ids})
    generator = torch.Generator().manual_seed(0)
    size, heads = 6, maps.shape[2]
    weights = torch.randn(maps.shape[1], heads, size, size, generator=generator).double()
    weights = weights / torch.linalg.matrix_norm(weights, 2)[..., None, None]

    def run(h: Tensor) -> Tensor:
        for layer, weight in zip(maps[0], weights, strict=True):
            mixed = torch.einsum("hij,hde,je->id", layer, weight, h)
            h = torch.relu(h + mixed)
        return h

    start = torch.rand(ids.shape[1], size, generator=generator).double()
    jacobian = torch.func.jacrev(run)(start)
    true = torch.linalg.matrix_norm(jacobian.permute(0, 2, 1, 3), 2)  # (i, p)
    found = Mixing(position=6, sink=0).measure(subject.model, [{"input_ids": ids}])
    bound = found.bound[0, 0, -1]
    later = range(7, ids.shape[1])
    assert all(float(true[i, 6]) <= float(bound[i]) + 1e-9 for i in later)
    assert max(float(true[i, 6] / bound[i]) for i in later) > 1e-3  # not so loose as to say nothing
    short = maps.clone() * 0.01  # the bound of other maps would not hold
    less = torch.eye(len(start), dtype=torch.float64)
    for layer in short[0]:
        less = (less.new_zeros(()) + layer.sum(0) + torch.eye(len(start))) @ less
    assert any(float(true[i, 6]) > float(less[i, 6]) for i in later)


def test_bad_data_are_named(stories: Any) -> None:
    subject = models.stories(stories)
    with pytest.raises(AttnbiasError, match="both 0"):
        Mixing(position=0)
    with pytest.raises(AttnbiasError, match="position"):
        Mixing(position=-1)
    with pytest.raises(AttnbiasError, match="row 0 has 13 tokens"):
        Mixing(position=30).measure(subject.model, [subject.inputs])
    same = torch.full((1, 8), 9)
    with pytest.raises(AttnbiasError, match="replacement"):
        Mixing().measure(subject.model, [{"input_ids": same}])
    vit = models.MAKERS["vit"]()
    with pytest.raises(AttnbiasError, match="input_ids"):
        Mixing().measure(vit.model, [vit.inputs])
