"""A direction at an entity's token, beside plain hooks on an eager float64 model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.measures import EntityAwareness, Measure
from tests.cases.measure import Maps, MeasureCase
from tests.measures.test_head_importance import padded
from tests.steer import models
from tests.steer.models import Subject

ENTITIES = (4, 6)
DRAWS = 3


def size_of(subject: Subject) -> int:
    config: Any = subject.model.config
    return int(getattr(config, "text_config", config).hidden_size)


def direction(subject: Subject) -> Tensor:
    return torch.randn(size_of(subject), generator=torch.Generator().manual_seed(5))


class TestEntityAwareness(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories", "llava")
    tolerance = 4e-5

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [padded(subject, "right" if subject.name == "minilm" else "left")]

    def build(self, subject: Subject) -> Measure:
        return EntityAwareness(
            direction(subject), layer=0, entities=ENTITIES, strength=0.7, draws=DRAWS
        )

    def values(self, result: Any) -> Tensor:
        return torch.cat([result.samples, result.control])

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        given: Any = direction(subject)
        noise = torch.randn(DRAWS, len(given), generator=torch.Generator().manual_seed(0))
        vectors = [given, *(v / v.norm() * given.norm() for v in noise)]
        (inputs,) = self.data(subject)
        rows = []
        for row, entity in enumerate(ENTITIES):
            one = subject.row(row, **inputs)
            if "attention_mask" in one:
                real = one.pop("attention_mask")[0].bool()
                one = {name: value[:, real] for name, value in one.items()}
            plain = self.looks(subject, one, entity, None)
            rows.append([self.looks(subject, one, entity, v) - plain for v in vectors])
        first = torch.stack([row[0] for row in rows])
        return torch.cat([first, torch.stack([torch.stack(row[1:]).mean(0) for row in rows])])

    def looks(self, subject: Subject, one: Any, entity: int, push: Tensor | None) -> Tensor:
        twin: Any = copy.deepcopy(subject.model).double()
        twin.set_attn_implementation("eager")
        layers = {
            "minilm": lambda: twin.encoder.layer,
            "stories": lambda: twin.model.layers,
            "llava": lambda: twin.model.language_model.layers,
        }[subject.name]()

        def add(_: Any, args: Any, out: Any) -> Any:
            hidden = (out[0] if isinstance(out, tuple) else out).clone()
            if push is not None:
                hidden[:, entity] += 0.7 * push.double()
            return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

        layers[0].register_forward_hook(add)
        doubles = {n: v.double() if v.is_floating_point() else v for n, v in one.items()}
        with torch.no_grad():
            maps = twin(**doubles, output_attentions=True).attentions[1:]
        return torch.stack([p[0, :, -1, entity].double() for p in maps])


def test_welch_and_bad_input(request: pytest.FixtureRequest) -> None:
    subject = models.make("stories", request)
    case = TestEntityAwareness()
    found = case.measured(subject)
    one, other = found.samples[:, 1, 2], found.control[:, 1, 2]
    error = (one.var() / 2 + other.var() / 2).sqrt()
    assert float(found.details["t"][1, 2]) == pytest.approx(float((one - other).mean() / error))
    assert found.layers == (1, 2, 3, 4)
    vector = direction(subject)
    for bad, word in (
        ({"entities": (4, 50)}, "name a token"),
        ({"entities": (4,)}, "name a token"),
        ({"entities": (4, 6, 1)}, "has 3 rows, and the data 2"),
        ({"layer": 4}, "layer must be 0 to 3"),
    ):
        given: dict[str, Any] = {"layer": 0, "entities": ENTITIES, "strength": 1.0, **bad}
        with pytest.raises(AttnbiasError, match=word):
            EntityAwareness(vector, draws=1, **given).measure(subject.model, case.data(subject))
    with pytest.raises(AttnbiasError, match="finite"):
        EntityAwareness(vector[None], 0, ENTITIES, 1.0)
