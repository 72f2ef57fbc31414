"""Pruning curves beside plain hooks, and models with heads really gone beside gated ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import HeadPruning, Measure, remove_heads
from tests.cases.measure import Maps, MeasureCase
from tests.cases.statistic import close
from tests.measures.test_head_importance import dense_loss, padded, pooled, targets
from tests.steer import models
from tests.steer.models import Subject

OUT = {  # heads out, and of a whole layer
    "stories": ((0, 1), (0, 3), (1, 0), (1, 2), (1, 5), *((2, h) for h in range(8))),
    "minilm": ((0, 2), (3, 11), (5, 0), *((4, h) for h in range(12))),
    "vit": ((0, 0), (1, 1), (1, 3), *((2, h) for h in range(4))),
    "mistral": ((0, 0), (1, 0), (1, 3), *((2, h) for h in range(4))),
    "llava": ((0, 0), (0, 1), (1, 3), *((2, h) for h in range(4))),
    "clip vision": ((0, 0), (0, 1), (1, 3), *((2, h) for h in range(4))),
    "bart encoder": ((0, 0), (0, 1), (0, 2)),
}


def score(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    return -pooled(outputs, inputs)


class TestHeadPruning(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "vit", "llava")
    tolerance = 5e-5
    step = 0.25

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [padded(subject, "left")]

    def order(self, subject: Subject) -> list[tuple[int, int]]:
        heads = 8 if subject.name == "stories" else 4
        every = [(site.layer, h) for site in targets(subject) for h in range(heads)]
        return every[::2] + every[1::2]

    def build(self, subject: Subject) -> Measure:
        return HeadPruning(order=tuple(self.order(subject)), step=self.step, score=score)

    def values(self, result: Any) -> Tensor:
        samples: Tensor = result.samples
        return samples

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        order, columns = self.order(subject), []
        (inputs,) = self.data(subject)
        for part in range(5):
            gone = set(order[: len(order) * part // 4])

            def gate(_: int, layer: int, out: Tensor) -> Tensor:
                keep = [(layer, h) not in gone for h in range(out.shape[2])]  # noqa: B023
                return out * torch.tensor(keep)[:, None]

            with torch.no_grad():
                columns.append(-dense_loss(subject, gate, inputs))
        return torch.stack(columns, 1)


def test_area_and_what_is_free(request: pytest.FixtureRequest) -> None:
    subject = models.make("vit", request)
    case = TestHeadPruning()
    curve = HeadPruning(order=tuple(case.order(subject)), score=score).measure(
        subject.model, [subject.inputs]
    )
    assert curve.shares.tolist() == pytest.approx([0, *(round(1.2 * n) / 12 for n in range(1, 11))])
    assert len(curve.heads[3]) == 4
    assert curve.area == pytest.approx(torch.trapezoid(curve.values, curve.shares).item())
    assert curve.free(1e9) == 1.0
    assert 0 <= curve.free(1e-9) < 1.0
    with pytest.raises(AttnbiasError, match="no layer 9"):
        HeadPruning(order=((9, 0),), score=score).measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="each of them once"):
        HeadPruning(order=((0, 0), (0, 0)))
    with pytest.raises(AttnbiasError, match="step"):
        HeadPruning(order=((0, 0),), step=0)


@pytest.mark.parametrize("name", OUT)
def test_heads_gone_are_heads_gated(name: str, request: pytest.FixtureRequest) -> None:
    subject = models.make(name, request)
    tower = subject.towers[0] if subject.towers else None
    before = {key: value.clone() for key, value in subject.model.state_dict().items()}
    small = remove_heads(subject.model, OUT[name], tower)
    now = subject.model.state_dict()
    assert all(torch.equal(value, now[key]) for key, value in before.items())
    weights = [sum(p.numel() for p in m.parameters()) for m in (small, subject.model)]
    assert weights[0] < weights[1]
    rule = ab.rules.BlockHeads(heads=OUT[name], towers=None if tower is None else (tower,))
    with torch.no_grad(), ab.steer(subject.model, rule):
        want = subject.run()
    with torch.no_grad():
        close(subject.run(small), want, 2e-5)
        assert float((subject.run() - want).abs().max()) > 1e-3


def test_generation_with_fewer_key_heads(request: pytest.FixtureRequest) -> None:
    subject = models.make("stories", request)
    model: Any = remove_heads(subject.model, OUT["stories"])
    given = {"attention_mask": torch.ones(1, 13), "do_sample": False, "max_new_tokens": 6}
    found = model.generate(subject.inputs["input_ids"][:1], **given)
    plain: Any = subject.model
    with ab.steer(plain, ab.rules.BlockHeads(heads=OUT["stories"])):
        want = plain.generate(subject.inputs["input_ids"][:1], **given)
    assert torch.equal(found, want)


def test_what_cannot_be_removed(request: pytest.FixtureRequest) -> None:
    with pytest.raises(Refused, match="BlockHeads"):
        remove_heads(models.make("gpt_oss", request).model, [(0, 0)])
    vit = models.make("vit", request).model
    with pytest.raises(AttnbiasError, match="no layer 7"):
        remove_heads(vit, [(7, 0)])
    with pytest.raises(AttnbiasError, match="has 4 heads"):
        remove_heads(vit, [(0, 4)])
