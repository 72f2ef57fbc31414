"""Word maps, heads as classifiers, probes and distances between heads, beside loops over maps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy.optimize import minimize  # type: ignore[import-untyped]
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.measures import AttentionProbe, HeadDistances, HeadRelations, Measure, WordMaps
from attnbias.measures.head_distances import Distances
from tests.cases.measure import Maps, MeasureCase
from tests.measures.test_head_importance import padded
from tests.steer import models
from tests.steer.models import Subject

SIDE = {"minilm": "right", "stories": "left"}
WORDS = ((-1, 0, 0, 1, 2, 2, 2, 3, 4, 1, 5, 5, -1), (0, 1, 1, -1, 2, 3, 3, 4, 4, 5))
RELATIONS = (
    ((0, 2, "a"), (1, (0, 4), "b"), (2, 5, "a"), (3, 2, "a"), (5, 3, "b")),
    ((0, 1, "a"), (3, 2, "a"), (4, (0, 3), "b"), (5, 0, "a"), (2, 4, "a")),
)


def real_maps(subject: Subject, maps: Maps) -> list[Tensor]:
    """For each row (layers, heads, tokens, tokens) without padding."""
    (layers,) = maps.values()
    mask = padded(subject, SIDE[subject.name])["attention_mask"].bool()
    return [torch.stack([p[row][:, mask[row]][..., mask[row]] for p in layers]) for row in range(2)]


def by_words(table: Tensor, words: tuple[int, ...]) -> Tensor:
    """Loops: sums to the pieces of a word, means from them."""
    count = max(words) + 1
    out = torch.zeros(*table.shape[:2], count, count, dtype=torch.float64)
    for a in range(count):
        for b in range(count):
            pieces = [n for n, w in enumerate(words) if w == a]
            aims = [n for n, w in enumerate(words) if w == b]
            for i in pieces:
                for j in aims:
                    out[:, :, a, b] += table[:, :, i, j] / len(pieces)
    return out


class Texts(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories")

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [padded(subject, SIDE[subject.name])]


class TestWordMaps(Texts):
    tolerance = 4e-5  # float32 through sharpened heads, in another batch

    def build(self, subject: Subject) -> Measure:
        return WordMaps(WORDS)

    def values(self, result: Any) -> Tensor:
        return torch.cat([table.flatten() for table in result.maps])

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        tables = real_maps(subject, maps)
        return torch.cat([by_words(t, w).flatten() for t, w in zip(tables, WORDS, strict=True)])


class TestHeadRelations(Texts):
    direction = "from"

    def build(self, subject: Subject) -> Measure:
        return HeadRelations(
            WORDS,
            RELATIONS,  # type: ignore[arg-type]
            relation="a",
            direction=self.direction,  # type: ignore[arg-type]
        )

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        found = []
        for table, words, related in zip(real_maps(subject, maps), WORDS, RELATIONS, strict=True):
            merged = by_words(table, words)
            for word, answer, label in related:
                if label != "a":
                    continue
                rows = []
                for layer in merged:
                    row = []
                    for head in layer:
                        line = (head[word] if self.direction == "from" else head[:, word]).tolist()
                        line[word] = -1
                        row.append(float(line.index(max(line)) == answer))
                    rows.append(row)
                found.append(rows)
        return torch.tensor(found)


class TestHeadRelationsTo(TestHeadRelations):
    direction = "to"


class TestAttentionProbe(Texts):
    tolerance = 2e-3  # two optimisers
    vectors: ClassVar[tuple[Tensor, ...] | None] = None

    def build(self, subject: Subject) -> Measure:
        return AttentionProbe(
            WORDS,
            RELATIONS,  # type: ignore[arg-type]
            vectors=self.vectors,
            decay=0.1,
        )

    def values(self, result: Any) -> Tensor:
        return torch.cat([result.to.flatten(), result.back.flatten(), result.hits.double()])

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        tables = [
            by_words(t, w).flatten(0, 1).numpy()
            for t, w in zip(real_maps(subject, maps), WORDS, strict=True)
        ]
        heads = len(tables[0])
        size = 1 if self.vectors is None else 2 * self.vectors[0].shape[1]

        def scores(flat: Any, row: int, word: int) -> Any:
            to, back = flat.reshape(2, heads, size)
            out = []
            for other in range(tables[row].shape[1]):
                pair = np.ones(1)
                if self.vectors is not None:
                    pair = torch.cat([self.vectors[row][other], self.vectors[row][word]]).numpy()
                value = to @ pair @ tables[row][:, word, other]
                out.append(value + back @ pair @ tables[row][:, other, word])
            out[word] = -np.inf
            return np.array(out)

        def answers(answer: int | tuple[int, ...]) -> list[int]:
            return [answer] if isinstance(answer, int) else list(answer)

        def loss(flat: Any) -> float:
            total = 0.1 * float(flat @ flat)
            for word, answer, _ in RELATIONS[0]:
                e = np.exp(scores(flat, 0, word))
                total -= math.log(e[answers(answer)].sum() / e.sum()) / len(RELATIONS[0])
            return total

        best = minimize(loss, np.zeros(2 * heads * size), tol=1e-12).x
        hits = [
            float(scores(best, 1, word).argmax() in answers(answer))
            for word, answer, _ in RELATIONS[1]
        ]
        return torch.cat([torch.tensor(best), torch.tensor(hits, dtype=torch.float64)])


class TestAttentionProbeWithVectors(TestAttentionProbe):
    subjects: ClassVar[tuple[str, ...]] = ("stories",)
    vectors = tuple(
        torch.randn(6, 1, generator=torch.Generator().manual_seed(n)).double() for n in range(2)
    )


class TestHeadDistances(MeasureCase):
    tolerance = 2e-5

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [padded(subject, SIDE.get(subject.name, "left"))]

    def build(self, subject: Subject) -> Measure:
        return HeadDistances()

    def values(self, result: Any) -> Tensor:
        values: Tensor = result.values
        return values

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        if subject.name in SIDE:
            tables = [t.flatten(0, 1) for t in real_maps(subject, maps)]
        else:
            (layers,) = maps.values()
            tables = [torch.stack([p[row] for p in layers]).flatten(0, 1) for row in range(2)]
        heads = len(tables[0])
        out, tokens = torch.zeros(heads, heads, dtype=torch.float64), 0
        for table in tables:
            p = 0.999 * table + 0.001 / table.shape[-1]
            tokens += table.shape[1]
            for a in range(heads):
                m = (p[a] + p) / 2
                left = (p[a] * (p[a] / m).log()).sum(-1)
                out[a] += ((left + (p * (p / m).log()).sum(-1)) / 2).sum(-1)
        return out / tokens


def test_rows_of_word_maps_sum_to_one(request: pytest.FixtureRequest) -> None:
    subject = models.make("minilm", request)
    words = (tuple(n * 5 // 13 for n in range(13)),) * 2
    found = WordMaps(words).measure(subject.model, [subject.inputs])
    assert all(torch.allclose(t.sum(-1), torch.ones(()).double()) for t in found.maps)


def test_distances_are_distances(request: pytest.FixtureRequest) -> None:
    subject = models.make("stories", request)
    found = HeadDistances().measure(subject.model, [subject.inputs])
    assert torch.allclose(found.values, found.values.T)
    assert float(found.values.diagonal().max()) < 1e-9
    assert 0 < float(found.values.max()) <= math.log(2)
    nearest = found.nearest((0, 0))[0]
    row = found.values[0].clone()
    row[0] = 9
    assert found.heads[int(row.argmin())] == nearest
    with pytest.raises(AttnbiasError, match="no layer 9"):
        found.nearest((9, 0))


def test_the_plane_keeps_distances_that_fit_in_it() -> None:
    places = torch.randn(7, 2, generator=torch.Generator().manual_seed(0)).double()
    want = torch.cdist(places, places)
    heads = tuple((0, n) for n in range(7))
    points = Distances("text", heads, want).points()
    assert torch.allclose(torch.cdist(points, points), want, atol=1e-6)
    # Those that do not: no worse than the classical solution that it starts from.
    far = want + torch.rand(7, 7, generator=torch.Generator().manual_seed(1)).double()
    far = ((far + far.T) / 2).fill_diagonal_(0)
    both = [Distances("text", heads, far).points(rounds=rounds) for rounds in (0, 300)]
    errors = [float((torch.cdist(p, p) - far).square().sum()) for p in both]
    assert errors[1] < 0.95 * errors[0]


def test_the_baseline_is_the_best_fixed_offset(request: pytest.FixtureRequest) -> None:
    subject = models.make("stories", request)
    inputs = padded(subject, "left")
    related = (((0, 1, "x"), (1, 2, "x"), (4, 2, "x")), ((2, 3, "x"),))
    found = HeadRelations(WORDS, related).measure(  # type: ignore[arg-type]
        subject.model, [inputs]
    )
    assert found.details["best offset"] == 1
    assert found.details["best offset accuracy"] == 0.75
    assert found.details["offsets"][-2] == 0.25


def test_bad_input(request: pytest.FixtureRequest) -> None:
    subject = models.make("stories", request)
    with pytest.raises(AttnbiasError, match="without gaps"):
        WordMaps(((0, 2),))
    with pytest.raises(AttnbiasError, match="has 3 tokens"):
        WordMaps(((0, 1, 2),)).measure(subject.model, [subject.row(0)])
    with pytest.raises(AttnbiasError, match="has 1 rows, and the data have more"):
        WordMaps(WORDS[:1]).measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="has 2 rows, and the data 1"):
        WordMaps(WORDS).measure(subject.model, [subject.row(0)])
    with pytest.raises(AttnbiasError, match="no relation 'z'"):
        HeadRelations(WORDS, RELATIONS, relation="z")  # type: ignore[arg-type]
    with pytest.raises(AttnbiasError, match="the row has 0 to 5"):
        HeadRelations(WORDS[:1], (((0, 9, "a"),),))  # type: ignore[arg-type]
    with pytest.raises(AttnbiasError, match="both must be some"):
        AttentionProbe(WORDS, RELATIONS, train=1.0).measure(  # type: ignore[arg-type]
            subject.model, [padded(subject, "left")]
        )
    with pytest.raises(AttnbiasError, match="smoothing"):
        HeadDistances(smoothing=1)
