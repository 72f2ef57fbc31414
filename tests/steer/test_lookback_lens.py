"""LookbackLens: its features beside dense maps, its fit, and its decoding beside a plain loop."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.hub import attach
from attnbias.steer.context import Editing
from attnbias.steer.lookback import stacked
from attnbias.steer.rules import Detector, LabelledText, LookbackLens
from tests.cases.driver import DriverCase
from tests.cases.rule import padded
from tests.steer.models import Subject, make

CONTEXT = (1, 5)
OPTIONS = {"max_new_tokens": 11, "pad_token_id": 0, "eos_token_id": None}


def dense(
    model: Any, ids: Tensor, context: tuple[int, int] = CONTEXT, layers: Any = None
) -> Tensor:
    """Ratios ``(heads of all layers, tokens)`` from whole maps, in float64."""
    with torch.no_grad():
        maps = model(input_ids=ids, output_attentions=True).attentions
    parts = []
    for number, found in enumerate(maps):
        if layers is not None and number not in layers:
            continue
        weights = found[0].double()
        rows = []
        for row in range(ids.shape[1]):
            inside = [key for key in range(row + 1) if context[0] <= key < context[1]]
            new = [key for key in range(row + 1) if key >= context[1]]
            a = weights[:, row, inside].mean(-1) if inside else weights.new_zeros(len(weights))
            b = weights[:, row, new].mean(-1) if new else weights.new_zeros(len(weights))
            total = a + b
            rows.append(torch.where(total > 0, a / total.clamp(min=1e-300), 0.5))
        parts.append(torch.stack(rows, -1))
    return torch.cat(parts)


def fitted(subject: Subject, seed: int = 0, **fields: Any) -> LookbackLens:
    """A rule with a random detector on all heads."""
    rule = LookbackLens(**{"heads": "all", **fields})
    editing = Editing([rule], {"context": CONTEXT})
    with torch.no_grad(), attach(subject.model, editing):
        subject.model(**subject.inputs)
        looked = dict(editing.memories[0].looked)
    _, places = stacked(rule, [{site: value[:1] for site, value in looked.items()}])
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(len(places), generator=generator).tolist()
    return replace(rule, detector=Detector(places, tuple(weights), 0.1))


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    return make("stories", request)


# Features ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stories", "mistral", "gpt_oss"])
def test_ratios_are_those_of_the_map(name: str, request: pytest.FixtureRequest) -> None:
    """Every row by one fused call, in one pass and in chunks, with windows and sinks."""
    from transformers import DynamicCache, StaticCache

    subject = make(name, request)
    ids = subject.inputs["input_ids"][:1]
    wanted = dense(subject.eager(), ids)
    rule = LookbackLens(heads="all")
    config = subject.model.config
    for sizes in ([13], [6, 1, 1, 4, 1]):
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=20)):
            editing = Editing([rule], {"context": CONTEXT})
            editing.memories[0].state["every"] = True
            parts, start = [], 0
            with torch.no_grad(), attach(subject.model, editing):
                for size in sizes:
                    subject.model(input_ids=ids[:, start : start + size], past_key_values=cache)
                    parts.append(stacked(rule, [editing.memories[0].looked])[0])
                    start += size
            assert torch.allclose(torch.cat(parts, -1), wanted, atol=2e-5), (name, sizes)
    assert float(wanted[:, 6:].std()) > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("every", [True, False])
def test_ratios_under_padding(subject: Subject, side: str, every: bool) -> None:
    inputs, _, rows = padded(subject, side)
    spans = {"context": [(1, 5), (2, 4)]}
    rule = LookbackLens(heads=[1, 6], layers=[0, 3])
    editing = Editing([rule], spans)
    if every:
        editing.memories[0].state["every"] = True
    with torch.no_grad(), attach(subject.model, editing):
        subject.model(**inputs)
        looked = dict(editing.memories[0].looked)
    assert sorted(site.layer for site in looked) == [0, 3]
    for row, part in enumerate(rows):
        ids = inputs["input_ids"][row : row + 1, part]
        wanted = dense(subject.eager(), ids, spans["context"][row], layers=[0, 3])
        wanted = wanted.reshape(2, 8, -1)[:, [1, 6]]
        for number, site in enumerate(sorted(looked, key=lambda site: site.layer)):
            found = looked[site][row].double()
            found = found[:, part] if every else found
            known = wanted[number] if every else wanted[number][:, -1:]
            assert torch.allclose(found, known, atol=2e-5)


def test_even_attention_gives_one_half_whatever_the_lengths(subject: Subject) -> None:
    """Means, not sums: the sizes of context and answer do not matter."""
    with torch.no_grad():
        for layer in subject.model.model.layers:
            layer.self_attn.q_proj.weight.zero_()
    rule = LookbackLens(heads="all")
    for context in ((0, 1), (1, 9), (3, 12)):
        editing = Editing([rule], {"context": context})
        editing.memories[0].state["every"] = True
        with torch.no_grad(), attach(subject.model, editing):
            subject.model(**subject.inputs)
        for found in editing.memories[0].looked.values():
            assert torch.allclose(found[..., context[1] :], torch.tensor(0.5), atol=1e-5)
            assert bool((found[..., context[0] : context[1]] == 1).all())  # nothing new yet


# The fit ----------------------------------------------------------------------------------------


def labelled(subject: Subject, count: int = 9) -> list[LabelledText]:
    generator = torch.Generator().manual_seed(4)
    found = []
    for number in range(count):
        ids = torch.randint(3, 97, (1, 24), generator=generator)
        labels = ((8, 13, number % 2 == 0), (13, 20, number % 3 == 0), (21, 24, True))
        found.append(LabelledText({"input_ids": ids}, {"context": CONTEXT}, labels))
    return found


@pytest.mark.parametrize("window", [None, 4])
def test_the_fit_is_that_of_dense_features(subject: Subject, window: int | None) -> None:
    from sklearn.linear_model import LogisticRegression

    texts = labelled(subject)
    rule = LookbackLens(heads="all").fit(subject.model, texts, window=window)
    rows, labels = [], []
    eager = subject.eager()
    for text in texts:
        ratios = dense(eager, text.inputs["input_ids"])
        good = {p: g for a, b, g in text.labels for p in range(a, b)}
        for start in range(8, 24):
            parts = [range(a, b) for a, b, _ in text.labels if window is None and a == start]
            if window is not None and all(p in good for p in range(start, start + window)):
                parts = [range(start, start + window)]
            for part in parts:
                # the row before a token is the one that predicts it
                rows.append(ratios[:, [p - 1 for p in part]].mean(-1).numpy())
                labels.append(min(good[p] for p in part))
    known = LogisticRegression(max_iter=1000).fit(np.array(rows), np.array(labels))
    detector = rule.detector
    assert detector is not None
    assert detector.examples == len(rows)
    assert detector.window == window
    assert detector.places == tuple((layer, head) for layer in range(5) for head in range(8))
    assert np.allclose(detector.weights, known.coef_[0], atol=1e-3)
    assert detector.intercept == pytest.approx(float(known.intercept_[0]), abs=1e-3)
    scores, given = rule.scores(subject.model, texts, window=window)
    assert np.allclose(scores, known.predict_proba(np.array(rows))[:, 1], atol=1e-4)
    assert given.tolist() == labels


def test_the_fit_leaves_padding_out(subject: Subject) -> None:
    texts = labelled(subject)
    wanted = LookbackLens(heads="all").fit(subject.model, texts)
    for side in ((3, 0), (0, 3)):
        moved = []
        for text in texts:
            ids = torch.nn.functional.pad(text.inputs["input_ids"], side)
            mask = torch.nn.functional.pad(torch.ones(1, 24, dtype=torch.long), side)
            inputs = {"input_ids": ids, "attention_mask": mask}
            if side[0]:
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            moved.append(replace(text, inputs=inputs))
        found = LookbackLens(heads="all").fit(subject.model, moved)
        assert found.detector is not None
        assert wanted.detector is not None
        assert np.allclose(found.detector.weights, wanted.detector.weights, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"texts": []}, "fit needs texts"),
        ({"texts": ["x"]}, "got str"),
        ({"labels": ((0, 3, True),)}, "labels the tokens"),
        ({"labels": ((9, 30, True),)}, "labels the tokens"),
        ({"labels": ((9, 12, True),)}, "faithful and unfaithful parts"),
        ({"spans": {}}, "has no span 'context'"),
        ({"window": 0}, "window must be"),
        ({"rows": 2}, "must hold one row"),
        ({"training": True}, r"model\.eval\(\)"),
    ],
)
def test_fit_refuses_in_one_sentence(subject: Subject, change: dict[str, Any], words: str) -> None:
    texts: Any = labelled(subject)
    for name in ("labels", "spans"):
        if name in change:
            texts = [replace(text, **{name: change[name]}) for text in texts]
    if "rows" in change:
        texts = [
            replace(t, inputs={"input_ids": t.inputs["input_ids"].repeat(2, 1)}) for t in texts
        ]
    if "training" in change:
        subject.model.train()
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        LookbackLens(heads="all").fit(
            subject.model, change.get("texts", texts), window=change.get("window")
        )
    assert "\n" not in str(caught.value)


def test_fit_shows_its_progress(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.progress import Progress

    steps: list[float] = []
    monkeypatch.setattr(Progress, "advance", lambda self, task, advance=1: steps.append(advance))
    LookbackLens(heads="all").fit(subject.model, labelled(subject))
    assert len(steps) == 9
    LookbackLens(heads="all").fit(subject.model, labelled(subject), progress=False)
    assert len(steps) == 9


def test_without_scikit_learn(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ab.errors.Refused, match="pip install scikit-learn"):
        LookbackLens(heads="all").fit(subject.model, labelled(subject))


# Decoding ---------------------------------------------------------------------------------------


def plain_loop(
    model: Any, ids: Tensor, rule: LookbackLens, length: int, context: tuple[int, int]
) -> Tensor:
    """The same decoding written down with whole maps and no cache."""
    assert rule.detector is not None
    weights = torch.tensor(rule.detector.weights, dtype=torch.float64)
    start = ids.shape[1]
    while ids.shape[1] < start + length:
        many = ids.repeat(rule.count, 1)
        for _ in range(min(rule.chunk, start + length - ids.shape[1])):
            with torch.no_grad():
                logits = model(input_ids=many).logits[:, -1] / rule.temperature
            order = logits.softmax(-1).sort(-1, descending=True)
            before = order.values.cumsum(-1) - order.values
            drop = torch.zeros_like(logits, dtype=torch.bool)
            drop.scatter_(-1, order.indices, before >= rule.top_p)
            chances = logits.masked_fill(drop, -torch.inf).softmax(-1)
            many = torch.cat([many, torch.multinomial(chances, 1)], 1)
        scores = []
        for row in many:
            ratios = dense(model, row[None], context)
            scores.append(float(weights @ ratios[:, ids.shape[1] - 1 : -1].mean(-1)))
        ids = many[scores.index(max(scores))][None]
    return ids


class TestLookbackLens(DriverCase):
    __test__ = True
    plain_by: ClassVar[dict[str, Any]] = {}

    def rule(self, subject: Subject) -> LookbackLens:
        found = fitted(subject, count=3, chunk=4)
        assert isinstance(found.detector, Detector)
        return found

    def oracle(self, model: Any, ids: Tensor, rule: LookbackLens) -> Tensor:
        return plain_loop(model, ids, rule, self.count, CONTEXT)


@pytest.mark.parametrize(
    ("name", "temperature", "context"),
    [("stories", 0.9, CONTEXT), ("mistral", 3.0, (9, 13))],  # a window of 6
)
def test_decoding_is_that_of_a_plain_loop(
    name: str, temperature: float, context: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    subject = make(name, request)
    ids = subject.inputs["input_ids"][:1]
    rule = fitted(subject, count=3, chunk=4, temperature=temperature)
    spans = {"context": context}
    torch.manual_seed(2)
    wanted = plain_loop(subject.eager(), ids, rule, 11, context)
    torch.manual_seed(2)
    with ab.steer(subject.model, rule, spans=spans):
        found = subject.model.generate(input_ids=ids, **OPTIONS)
    assert torch.equal(found, wanted)
    assert rule.detector is not None
    turned = replace(rule.detector, weights=tuple(-w for w in rule.detector.weights))
    torch.manual_seed(2)
    with ab.steer(subject.model, replace(rule, detector=turned), spans=spans):
        other = subject.model.generate(input_ids=ids, **OPTIONS)
    assert not torch.equal(other, wanted)


def test_rows_of_a_batch_have_their_own_context(subject: Subject) -> None:
    """The first row of a batch is what it is alone with the same random numbers."""
    inputs, _, rows = padded(subject, "left")
    del inputs["position_ids"]
    rule = fitted(subject, count=4, chunk=4)
    found = []
    for part, spans in ((slice(0, 2), [(1, 5), (2, 4)]), (slice(0, 1), (1, 5))):
        torch.manual_seed(3)
        with ab.steer(subject.model, rule, spans={"context": spans}):
            given = {name: value[part] for name, value in inputs.items()}
            found.append(subject.model.generate(**given, **OPTIONS))
    assert torch.equal(found[0][:1], found[1])
    # and the second what it is behind the first, without its padding
    torch.manual_seed(3)
    with ab.steer(subject.model, rule, spans={"context": (1, 5)}):
        subject.model.generate(input_ids=inputs["input_ids"][:1], **OPTIONS)
    with ab.steer(subject.model, rule, spans={"context": (2, 4)}):
        alone = subject.model.generate(input_ids=inputs["input_ids"][1:, rows[1]], **OPTIONS)
    assert torch.equal(found[0][1, rows[1].start :], alone[0])


def test_the_settings_of_the_call_are_used_on_request(subject: Subject) -> None:
    rule = fitted(subject, count=1, temperature=None, top_p=None)
    ids = subject.inputs["input_ids"][:1]
    options = {**OPTIONS, "do_sample": True, "temperature": 0.6, "top_k": 7}
    torch.manual_seed(1)
    plain = subject.model.generate(input_ids=ids, **options)
    torch.manual_seed(1)
    with ab.steer(subject.model, rule, spans={"context": CONTEXT}):
        found = subject.model.generate(input_ids=ids, **options)
    assert torch.equal(found, plain)


def test_a_plain_forward_is_left_alone(subject: Subject) -> None:
    rule = fitted(subject)
    with torch.no_grad():
        plain = subject.run()
        with ab.steer(subject.model, rule, spans={"context": CONTEXT}):
            assert torch.equal(subject.run(), plain)
    assert "generate" not in vars(subject.model)


def test_the_image_can_be_the_context(request: pytest.FixtureRequest) -> None:
    subject = make("llava", request)
    rule = fitted(subject, context="image", towers=("text",), count=2, chunk=3)
    with ab.steer(subject.model, rule, spans=subject.spans):
        found = subject.model.generate(**subject.inputs, **OPTIONS)
    assert found.shape == (2, 27)


def test_what_is_missing_or_wrong(subject: Subject) -> None:
    bare = LookbackLens(heads="all")
    with (
        pytest.raises(ab.errors.Refused, match=r"fit\(model, texts\)"),
        ab.steer(subject.model, bare, spans={"context": CONTEXT}),
    ):
        pass
    rule = fitted(subject)
    with pytest.raises(ab.AttnbiasError, match="needs the span"), ab.steer(subject.model, rule):
        pass
    other = replace(rule, heads=(0, 1))
    with (
        ab.steer(subject.model, other, spans={"context": CONTEXT}),
        pytest.raises(ab.AttnbiasError, match="fitted on 40 heads"),
    ):
        subject.model.generate(input_ids=subject.inputs["input_ids"], **OPTIONS)
    for fields, words in (
        ({"count": 0}, "count must"),
        ({"chunk": True}, "chunk must"),
        ({"temperature": 0.0}, "temperature must"),
        ({"top_p": 1.5}, "top_p must"),
        ({"phase": "decode"}, "phase must"),
        ({"context": ()}, "at least one key"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words):
            LookbackLens(heads="all", **fields)  # type: ignore[arg-type]
    for weights, words in (((1.0,), "one weight for each"), ((float("nan"), 0.0), "finite")):
        with pytest.raises(ab.AttnbiasError, match=words):
            Detector(((0, 0), (0, 1)), weights, 0.0)


def test_a_fitted_rule_survives_a_recipe(subject: Subject, tmp_path: Path) -> None:
    rule = LookbackLens(heads=[0, 3], layers=[1]).fit(subject.model, labelled(subject), window=4)
    ab.Recipe.of(subject.model, rule).save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json").rules == (rule,)
