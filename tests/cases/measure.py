"""The case that every measure inherits: build it, say what it must give by a dense route.

A new measure subclasses `MeasureCase`, gives `build()` and `dense(subject, maps)`, and is then held
against whole eager maps (or plain PyTorch hooks, gradients, loops) on real and tiny models with
sharpened heads: a trained encoder with padding, a trained decoder with grouped-query heads, a
vision model, a model of images and text.
"""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.measures import Measure
from tests.cases.statistic import close
from tests.steer import models
from tests.steer.models import Subject

Maps = dict[str, list[Tensor]]


def eager_maps(subject: Subject, inputs: Mapping[str, Any] | None = None) -> Maps:
    """Tower -> map (batch, heads, queries, keys) of each layer, float64, from the eager twin."""
    twin = copy.deepcopy(subject.model)
    twin.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        out = twin(**(inputs or subject.inputs), output_attentions=True)
    towers = list(dict.fromkeys(site.tower for site in ab.sites(subject.model)))
    tower = "text" if "text" in towers else towers[0]
    return {tower: [p.double() for p in out.attentions]}


class MeasureCase(ABC):
    """Inherit, supply `build` and `dense`."""

    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories", "vit", "llava")
    needs_data: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-5

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """One test for each subject of the class."""
        if metafunc.function.__name__ in vars(MeasureCase):
            metafunc.parametrize("name", metafunc.cls.subjects)

    @abstractmethod
    def build(self, subject: Subject) -> Measure:
        """A small instance, for a subject."""

    @abstractmethod
    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        """What `values` must be, by another route: from the maps of `data`, or plain PyTorch."""

    def data(self, subject: Subject) -> list[Mapping[str, Any]] | None:
        """The forwards measured; the maps are those of the first."""
        return [subject.inputs] if self.needs_data else None

    def values(self, result: Any) -> Tensor:
        """The numbers of a result: those of `Scores` by sample, layer and head."""
        samples: Tensor = result.samples
        return samples

    def measured(self, subject: Subject) -> Any:
        return self.build(subject).measure(subject.model, self.data(subject))

    def test_equals_the_dense_route(self, name: str, request: pytest.FixtureRequest) -> None:
        subject = models.make(name, request)
        given = self.data(subject)
        maps = eager_maps(subject, given[0] if given else None)
        close(self.values(self.measured(subject)), self.dense(subject, maps), self.tolerance)

    def test_leaves_the_model_as_it_was(self, name: str, request: pytest.FixtureRequest) -> None:
        subject = models.make(name, request)
        model = subject.model
        before = {name: value.clone() for name, value in model.state_dict().items()}
        kept = torch.random.get_rng_state()
        with torch.no_grad():
            plain = subject.run()
        first: nn.Module = next(m for m in model.modules() if m is not model)
        first.training = True  # each module's own mode, not one for all
        try:
            self.measured(subject)
            assert first.training
        finally:
            first.training = False
        assert not model.training
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(torch.random.get_rng_state(), kept)
        with torch.no_grad():
            assert torch.equal(subject.run(), plain)

    def test_is_the_same_twice_and_in_other_batches(
        self, name: str, request: pytest.FixtureRequest
    ) -> None:
        subject = models.make(name, request)
        measure = self.build(subject)
        whole = self.values(measure.measure(subject.model, self.data(subject)))
        close(self.values(measure.measure(subject.model, self.data(subject))), whole, 0.0)
        if self.needs_data:
            parts = [row for given in self.data(subject) or [] for row in self.rows(subject, given)]
            close(self.values(measure.measure(subject.model, parts)), whole, 2 * self.tolerance)

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """The rows of a forward as forwards of their own."""
        count = len(next(iter(subject.inputs.values())))
        return [subject.row(number, **given) for number in range(count)]

    def test_says_what_it_needs(self, name: str, request: pytest.FixtureRequest) -> None:
        subject = models.make(name, request)
        measure = self.build(subject)
        json.dumps(measure.parameters(), default=lambda value: f"<{type(value).__name__}>")
        if not self.needs_data:
            return
        for bad in (None, []):
            with pytest.raises(AttnbiasError, match="data"):
                measure.measure(subject.model, bad)
