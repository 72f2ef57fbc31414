"""Reference frames: made maps of each type, graphs that are known, and all numbers by loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, ReferenceFrame
from attnbias.measures.reference_frame import Frame, anchors, frame_type, graph_numbers
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

QUANTILES = (0.5, 0.9)


class TestReferenceFrame(MeasureCase):
    def build(self, subject: Subject) -> Measure:
        return ReferenceFrame(excess=0.05, quantiles=QUANTILES)

    def values(self, result: Frame) -> Tensor:
        """(samples, layers, 4 * quantiles + 1 + tokens)."""
        graph = torch.cat(
            [result.connectivity, result.centralisation, result.components, result.cycles], -1
        )
        tokens = result.anchored[:, None].expand(-1, graph.shape[1], -1)
        return torch.cat([graph, result.concentration[..., None], tokens], -1)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (layers,) = maps.values()
        samples = []
        for row in range(len(layers[0])):
            graphs, shares = [], []
            for layer in layers:
                heads = [p.numpy() for p in layer[row]]
                graphs.append(np.mean([np.array(by_hand(p)).T.ravel() for p in heads], 0))
                shares.append(np.mean([anchored_by_hand(p, subject.causal) for p in heads], 0))
            tokens = np.mean(shares, 0)
            samples.append([[*g, s.sum(), *tokens] for g, s in zip(graphs, shares, strict=True)])
        return torch.tensor(np.array(samples))


def anchored_by_hand(p: Any, causal: bool) -> Any:
    n, found = len(p), np.zeros(len(p))
    for key in range(n):
        queries = range(key, n) if causal else range(n)
        got = sum(p[i, key] for i in queries) / len(queries)
        even = sum(1 / (i + 1) if causal else 1 / n for i in queries) / len(queries)
        if (got - even) / (1 - even) > 0.05 and len(queries) >= n / 4:
            found[key] = sum(p[i, key] for i in queries) / n
    return found


def by_hand(p: Any) -> list[list[float]]:
    """For each quantile: connectivity, centralisation, components, cycles, by searching."""
    n, found = len(p), []
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    weights = {(i, j): (p[i, j] + p[j, i]) / 2 for i, j in pairs}
    for quantile in QUANTILES:
        least = np.quantile(list(weights.values()), quantile)
        edges = [pair for pair in pairs if weights[pair] > least]
        laplacian = np.zeros((n, n))
        for i, j in edges:
            laplacian[i, i] += 1
            laplacian[j, j] += 1
            laplacian[i, j] = laplacian[j, i] = -1
        degree = np.diag(laplacian)
        parents = list(range(n))

        def root(i: int, parents: list[int] = parents) -> int:
            return i if parents[i] == i else root(parents[i], parents)

        for i, j in edges:
            parents[root(i)] = root(j)
        parts = len({root(i) for i in range(n)})
        found.append(
            [
                max(np.sort(np.linalg.eigvalsh(laplacian))[1], 0.0),
                sum(degree.max() - degree) / ((n - 1) * (n - 2)),
                parts,
                len(edges) - n + parts,
            ]
        )
    return found


def made(sinks: dict[int, float], causal: bool, n: int = 24) -> Tensor:
    """A map (1, 1, n, n) with shares on some keys, the rest even over what each query sees."""
    p = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        seen = i + 1 if causal else n
        here = {k: s for k, s in sinks.items() if k < seen}
        p[i, :seen] = (1 - sum(here.values())) / seen
        for k, s in here.items():
            p[i, k] += s
    return p[None, None]


@pytest.mark.parametrize(
    ("sinks", "causal", "kind"),
    [
        ({0: 0.6}, True, "centralised"),
        ({0: 0.6}, False, "centralised"),
        ({5: 0.7}, True, "centralised"),  # the anchor need not be the first token
        ({0: 0.25, 4: 0.25, 9: 0.25}, True, "distributed"),
        ({3: 0.2, 8: 0.2, 15: 0.2}, False, "distributed"),
        ({0: 0.3, 23: 0.3}, False, "bidirectional"),
        ({0: 0.5, 23: 0.05}, False, "centralised"),  # the other end is too weak
        ({}, True, "none"),
        ({}, False, "none"),
    ],
)
def test_made_maps_get_their_type(sinks: dict[int, float], causal: bool, kind: str) -> None:
    assert frame_type(anchors(made(sinks, causal), 0.1)[0, 0]) == kind


def test_a_short_text_can_have_an_anchor_too() -> None:
    """Of six tokens under a causal mask the first gets 0.41 of even attention."""
    assert frame_type(anchors(made({}, True, 6), 0.1)[0, 0]) == "none"
    assert frame_type(anchors(made({0: 0.5}, True, 6), 0.1)[0, 0]) == "centralised"


def test_anchors_say_how_much_attention_they_hold() -> None:
    found = anchors(made({0: 0.6}, causal=False), 0.1)[0, 0]
    assert float(found[0]) == pytest.approx(0.6 + 0.4 / 24)
    assert float(found[1:].sum()) == 0.0


def test_graphs_that_are_known() -> None:
    n = 8
    star = torch.zeros(n, n, dtype=torch.float64)
    star[1:, 0] = 1.0
    assert graph_numbers(star, 0.7).tolist() == pytest.approx([1.0, 1.0, 1.0, 0.0])
    ring = torch.zeros(n, n, dtype=torch.float64)
    for i in range(n):
        ring[i, (i + 1) % n] = 1.0
    want = [2 - 2 * math.cos(2 * math.pi / n), 0.0, 1.0, 1.0]
    assert graph_numbers(ring, 0.5).tolist() == pytest.approx(want)
    apart = torch.zeros(n, n, dtype=torch.float64)
    apart[1, 0] = apart[3, 2] = 1.0
    assert graph_numbers(apart, 0.5).tolist() == pytest.approx([0.0, 4 / 42, 6.0, 0.0], abs=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_part_of_it(stories: Any, side: str) -> None:
    subject = models.stories(stories)
    ids = subject.inputs["input_ids"]
    long, short = ids[:1], ids[1:, :9]
    pad = {"left": (4, 0), "right": (0, 4)}[side]
    both = {
        "input_ids": torch.cat([long, nn.functional.pad(short, pad)]),
        "attention_mask": torch.cat(
            [torch.ones_like(long), nn.functional.pad(torch.ones_like(short), pad)]
        ),
    }
    together = ReferenceFrame(excess=0.05).measure(subject.model, [both])
    alone = ReferenceFrame(excess=0.05).measure(
        subject.model, [{"input_ids": long}, {"input_ids": short}]
    )
    for name in ("anchored", "concentration", "connectivity", "centralisation", "cycles"):
        one, other = getattr(together, name), getattr(alone, name)
        assert torch.allclose(one, other, atol=1e-5, equal_nan=True), name
    assert together.types == alone.types


def test_bad_parameters_are_named(stories: Any) -> None:
    with pytest.raises(AttnbiasError, match="excess"):
        ReferenceFrame(excess=0.0)
    with pytest.raises(AttnbiasError, match="quantiles"):
        ReferenceFrame(quantiles=(1.5,))
    subject = models.stories(stories)
    with pytest.raises(AttnbiasError, match="3 tokens"):
        ReferenceFrame().measure(subject.model, [{"input_ids": torch.tensor([[1, 5]])}])
