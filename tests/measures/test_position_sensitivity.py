"""Position curves, retrieval and saliency, each beside a plain route of its own."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures import (
    Measure,
    PositionSaliency,
    PositionSensitivity,
    Retrieval,
    position_curve,
)
from tests.cases.measure import Maps, MeasureCase
from tests.measures.words import pieces
from tests.steer import models
from tests.steer.models import Subject

FILL = [
    "The wind went over the hill and nobody saw it go.",
    "A long road leads down to the river.",
    "They sat by the fire until late.",
    "Rain fell on the roof all night.",
]


def retrieval() -> Retrieval:
    """Two answers, each at four places of a document."""
    facts = ["Alma keeps a brass key in the mill.", "Boris hides a red book in the barn."]
    queries: list[str] = []
    documents: list[str] = []
    positives, spans, groups = [], [], []
    for number, fact in enumerate(facts):
        for place in range(4):
            lines = FILL[: 3 + number]
            lines = [*lines[:place], fact, *lines[place:]]
            text = " ".join(lines)
            queries.append(("Who has a key in the mill?", "Where is the red book?")[number])
            positives.append(len(documents))
            documents.append(text)
            start = text.index(fact)
            spans.append((start, start + len(fact)))
            groups.append(number)
    return Retrieval(
        tuple(queries), tuple(documents), tuple(positives), tuple(spans), tuple(groups)
    )


def twin_of(subject: Subject) -> Any:
    twin: Any = copy.deepcopy(subject.model).double()
    twin.set_attn_implementation("eager")
    return twin


def alone(twin: Any, subject: Subject, text: str) -> tuple[Any, Tensor]:
    """The eager float64 twin's last states of one text without padding."""
    ids = torch.tensor([pieces(subject.name)(text)["input_ids"]])
    table = twin.get_input_embeddings()(ids).detach().requires_grad_()
    core = getattr(twin, "model", twin)  # without a head for words
    return table, core(inputs_embeds=table).last_hidden_state[0]


class TestPositionSensitivity(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories")
    needs_data = False
    side = "left"
    pooling = "mean"

    def build(self, subject: Subject) -> Measure:
        return PositionSensitivity(
            retrieval(),
            pieces(subject.name, self.side if subject.name == "stories" else "right"),
            pooling=self.pooling,  # type: ignore[arg-type]
            depth=4,
            draws=5,
            batch=3,
        )

    def values(self, result: Any) -> Tensor:
        scores: Tensor = result.scores
        return scores

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        given, twin = retrieval(), twin_of(subject)

        @functools.cache
        def vector(text: str) -> Tensor:
            states = alone(twin, subject, text)[1].detach()
            found = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[self.pooling]
            return torch.nn.functional.normalize(found, dim=0)

        documents = [vector(text) for text in given.documents]
        found = []
        for query, at in zip(given.queries, given.positives, strict=True):
            near = [float(vector(query) @ document) for document in documents]
            place = sorted(range(len(near)), key=lambda n: (-near[n], n)).index(at)
            found.append(1 / math.log2(place + 2) if place < 4 else 0.0)
        return torch.tensor(found)


class TestLastToken(TestPositionSensitivity):
    pooling = "last"


class TestFirstToken(TestPositionSensitivity):
    subjects: ClassVar[tuple[str, ...]] = ("minilm",)
    pooling = "first"


class TestPositionSaliency(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories")
    needs_data = False
    tolerance = 1e-4

    def build(self, subject: Subject) -> Measure:
        return PositionSaliency(
            retrieval(), pieces(subject.name), least=30, between=(0.2, 0.7), points=17
        )

    def values(self, result: Any) -> Tensor:
        samples: Tensor = result.samples
        return samples

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        given, twin, rows = retrieval(), twin_of(subject), []
        for query, at, middle in zip(
            given.queries, given.positives, given.relative.tolist(), strict=True
        ):
            text = given.documents[at]
            if not 0.2 <= middle <= 0.7 or len(pieces(subject.name)(text)["input_ids"]) < 30:
                continue
            wanted = alone(twin, subject, query)[1].mean(0).detach()
            table, states = alone(twin, subject, text)
            near = nn.functional.cosine_similarity(states.mean(0), wanted, dim=0)
            size = torch.autograd.grad(near, table)[0][0].norm(dim=-1)
            size = size[1:-1] if subject.name == "minilm" else size[1:]
            most = size.sort().values
            place = 0.99 * (len(most) - 1)
            top = most[int(place)] + (place % 1) * (most[int(place) + 1] - most[int(place)])
            size = size.clamp_max(top) / top
            at_points = [n * (len(size) - 1) / 16 for n in range(17)]
            rows.append(
                [
                    float(
                        size[int(p)] * (1 - p % 1) + size[min(int(p) + 1, len(size) - 1)] * (p % 1)
                    )
                    for p in at_points
                ]
            )
        assert len(rows) >= 2
        return torch.tensor(rows)


def curve_data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(400, generator=generator, dtype=torch.float64)
    return x, 1 - 0.5 * x + 0.2 * torch.randn(400, generator=generator)


def test_the_curve_is_what_the_definitions_say() -> None:
    x, y = curve_data()
    x[:4] = torch.tensor([0.0, 0.1, 0.2, 1.0])  # on edges: closed on the right
    found = position_curve(x, y, bins=10, draws=200)
    bins = [min(max(math.ceil(v * 10 - 1e-9) - 1, 0), 9) for v in x.tolist()]
    means = [float(y[[n for n, b in enumerate(bins) if b == k]].mean()) for k in range(10)]
    assert found.values.tolist() == pytest.approx(means)
    assert found.counts.tolist() == [bins.count(k) for k in range(10)]
    centres = [(k + 0.5) / 10 for k in range(10)]
    assert found.score.value == pytest.approx(sum(means) / 10)
    assert found.psi.value == pytest.approx(1 - min(means) / max(means))
    assert found.slope.value == pytest.approx(stats.linregress(centres, means).slope)
    assert found.pearson.value == pytest.approx(stats.pearsonr(centres, means)[0])
    assert found.spearman.value == pytest.approx(stats.spearmanr(centres, means)[0])
    assert found.kendall.value == pytest.approx(stats.kendalltau(centres, means)[0])
    assert found.slope.low < found.slope.value < found.slope.high < 0
    assert bool((found.low < found.values).all() and (found.values < found.high).all())
    assert found.word == "primacy"
    assert "primacy" in str(found)
    assert position_curve(1 - x, y, bins=10, draws=200).word == "recency"


def test_ties_and_empty_bins() -> None:
    found = position_curve([0.02, 0.12, 0.5, 0.52, 0.97], [1, 1, 0, 1, 0.25], bins=10, draws=50)
    means, centres = [1, 1, 0, 1, 0.25], [0.05, 0.15, 0.45, 0.55, 0.95]
    assert found.values.isnan().sum() == 5
    assert found.spearman.value == pytest.approx(stats.spearmanr(centres, means)[0])
    assert found.kendall.value == pytest.approx(stats.kendalltau(centres, means)[0])
    assert found.psi.value == 1.0


def test_intervals_hold_as_often_as_they_say() -> None:
    """Of 60 samples of one law, about nine in ten intervals of 90% hold the true slope."""
    held, none, chance = 0, 0, []
    for seed in range(60):
        x, y = curve_data(seed)
        found = position_curve(x, y, bins=5, draws=200, confidence=0.9, seed=seed)
        held += found.slope.low <= -0.5 <= found.slope.high
        flat = position_curve(x, y + 0.5 * x, bins=5, draws=100, seed=seed)
        none += flat.word == "none found"
        chance.append(flat.chance.value - flat.psi.value)
    assert 47 <= held <= 60
    assert none >= 50  # 5% by the slope, 2.5% by PSI
    assert abs(sum(chance) / len(chance)) < 0.01  # an even curve's PSI is what chance gives


def test_groups_are_drawn_together() -> None:
    """Copies of the same samples are no new evidence where they are known to be copies."""
    x, y = curve_data()
    number = torch.arange(400)
    one = position_curve(x, y, bins=5, groups=number).slope
    same = position_curve(x.repeat(4), y.repeat(4), bins=5, groups=number.repeat(4)).slope
    loose = position_curve(x.repeat(4), y.repeat(4), bins=5).slope
    assert same.high - same.low == pytest.approx(one.high - one.low, rel=0.01)
    assert loose.high - loose.low < 0.6 * (one.high - one.low)


def test_chance_deals_within_groups() -> None:
    """Facts that differ a lot, each even over its places: no finding, though the bins differ."""
    place, fact = torch.arange(200) % 10, torch.arange(200) // 10
    level = (fact * 7 % 20) / 20
    noise = 0.01 * torch.randn(200, generator=torch.Generator().manual_seed(3))
    found = position_curve((place + 0.5) / 10, level + noise, bins=10, groups=fact)
    assert found.word == "none found"
    tilted = position_curve((place + 0.5) / 10, level - 0.02 * place, bins=10, groups=fact)
    assert tilted.word == "primacy"
    assert tilted.psi.value > tilted.chance.high


def test_the_buckets_of_lengths(request: pytest.FixtureRequest) -> None:
    subject = models.make("minilm", request)
    tokens = [len(pieces("minilm")(text)["input_ids"]) for text in retrieval().documents]
    least = min(tokens)
    measure = PositionSensitivity(retrieval(), pieces("minilm"), edges=(least, 500), draws=5)
    found = measure.measure(subject.model)
    assert set(found.curves) == {f"up to {least}", "up to 500", "all"}
    assert found.lengths.tolist() == tokens
    assert int(found.curves[f"up to {least}"].counts.sum()) == sum(n <= least for n in tokens)
    assert "documents of all tokens" in str(found)


def test_bad_input(request: pytest.FixtureRequest) -> None:
    given: Mapping[str, Any] = vars(retrieval())
    for bad, word in (
        ({"positives": given["positives"][:-1]}, "as many"),
        ({"positives": (99, *given["positives"][1:])}, "no such document"),
        ({"spans": ((5, 10**6), *given["spans"][1:])}, "characters"),
    ):
        with pytest.raises(AttnbiasError, match=word):
            replace(retrieval(), **bad)
    tokenizer = pieces("minilm")
    with pytest.raises(AttnbiasError, match="pooling"):
        PositionSensitivity(retrieval(), tokenizer, pooling="max")  # type: ignore[arg-type]
    with pytest.raises(AttnbiasError, match="edges must rise"):
        PositionSensitivity(retrieval(), tokenizer, edges=(9, 5))
    subject = models.make("minilm", request)
    for measure in (
        PositionSensitivity(retrieval(), tokenizer),
        PositionSaliency(retrieval(), tokenizer),
    ):
        with pytest.raises(AttnbiasError, match="give no data"):
            measure.measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="1024 tokens or more"):
        PositionSaliency(retrieval(), tokenizer).measure(subject.model)
    with pytest.raises(AttnbiasError, match="as many numbers"):
        position_curve([0.5], [1, 2])
    with pytest.raises(AttnbiasError, match="bins"):
        position_curve([0.5], [1], bins=1)
