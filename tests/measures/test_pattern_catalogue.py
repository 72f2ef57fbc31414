"""The catalogue of patterns: planted maps are told apart, maps are the eager ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import Measure
from attnbias.measures.pattern_catalogue import clusters
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

m = ab.measures


class TestPatternCatalogue(MeasureCase):
    subjects = ("vit", "minilm")

    def build(self, subject: Subject) -> Measure:
        return m.PatternCatalogue(patterns=3, steps=20, side=8)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        """The typical maps, from the eager maps by the labels: what a group's heads show."""
        (layers,) = maps.values()
        whole = torch.stack(layers, 1)  # (samples, layers, heads, N, N)
        found = self.measured(subject)
        pooled = torch.zeros(*whole.shape[:3], 8, 8, dtype=torch.float64)
        size = whole.shape[-1]
        cuts = [(n * size // 8, -(-(n + 1) * size // 8)) for n in range(8)]
        for (i, (a, b)), (j, (c, d)) in itertools.product(enumerate(cuts), repeat=2):
            pooled[..., i, j] = whole[..., a:b, c:d].mean((-1, -2))
        pooled = pooled / pooled.sum(-1, keepdim=True)
        return torch.stack([pooled[found.labels == n].mean(0) for n in range(3)])

    def values(self, result: m.Patterns) -> Tensor:
        return result.typical


def planted(kind: str, generator: torch.Generator, side: int = 16) -> Tensor:
    noise = 0.2 * torch.rand(side, side, generator=generator)
    gap = (torch.arange(side)[:, None] - torch.arange(side)).abs()
    if kind == "diagonal":
        noise = noise + 10 * (gap == 0)
    elif kind == "near the diagonal":
        noise = noise + 3 * ((gap > 0) & (gap <= 2))
    elif kind == "stripes":
        noise[:, 3] += 10
    elif kind == "blocks":
        noise = noise + 3 * ((torch.arange(side)[:, None] // 8) != (torch.arange(side) // 8))
    else:
        noise = noise + 1
    return noise / noise.sum(-1, keepdim=True)


KINDS = ("diagonal", "near the diagonal", "stripes", "blocks", "even")


def test_planted_patterns_are_recovered_and_named() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.stack(
        [torch.stack([planted(kind, generator) for kind in KINDS]) for _ in range(20)]
    )[:, None].double()
    found = m.PatternCatalogue(patterns=5).catalogue(maps, (0,))
    groups = [set(found.labels[:, 0, head].tolist()) for head in range(5)]
    assert all(len(group) == 1 for group in groups)  # the same for all samples of a kind
    assert len(set.union(*groups)) == 5
    assert [found.name(found.of(0, head)) for head in range(5)] == list(KINDS)
    assert found.error[0] < 0.2 * found.error[1]
    assert found.shares().tolist() == pytest.approx([0.2] * 5)
    with pytest.raises(AttnbiasError, match="no layer 2"):
        found.of(2, 0)


def test_clusters_of_equal_points_and_bad_sizes() -> None:
    groups = clusters(torch.zeros(5, 2), 3, torch.Generator().manual_seed(0))
    assert groups.tolist() == [0] * 5
    with pytest.raises(AttnbiasError, match="whole number"):
        m.PatternCatalogue(patterns=0)
    with pytest.raises(AttnbiasError, match="2 maps"):
        m.PatternCatalogue(side=2).catalogue(torch.ones(1, 1, 2, 2, 2) / 2, (0,))


def test_long_sequences_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = models.MAKERS["vit"]()
    monkeypatch.setattr("attnbias.measures.pattern_catalogue.TOKENS", 16)
    with pytest.raises(Refused, match="whole maps"):
        m.PatternCatalogue().measure(subject.model, [subject.inputs])
