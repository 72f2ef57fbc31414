"""Measures of vision models and of models of images and text, beside dense routes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, visual_heads
from attnbias.measures.locality import nmi
from attnbias.measures.offset_heads import beside, peak
from attnbias.measures.pruning_importance import differences
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

m = ab.measures


def real(subject: Subject, p: Tensor, row: int) -> Tensor:
    """The map of a row without its padding."""
    mask = subject.inputs.get("attention_mask")
    keep = slice(None) if mask is None else mask[row].bool()
    return p[row][:, keep][..., keep]


class TestLocality(MeasureCase):
    tolerance = 5e-5  # a difference of entropies over their root: small ones enlarge its rounding

    def build(self, subject: Subject) -> Measure:
        return m.Locality(tower="text" if subject.name == "llava" else None)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (layers,) = maps.values()
        return torch.stack([
            torch.stack([information(real(subject, p, row)) for p in layers])
            for row in range(len(layers[0]))
        ])  # fmt: skip


def information(p: Tensor) -> Tensor:
    """NMI of maps (heads, queries, keys), from the joint distribution alone."""
    joint = p / p.shape[-2]
    query, key = joint.sum(-1), joint.sum(-2)
    product = query[..., None] * key[..., None, :]
    shared = torch.where(joint > 0, joint * (joint / product).log(), 0.0).sum((-1, -2))

    def entropy(one: Tensor) -> Tensor:
        return -torch.xlogy(one, one).sum(-1)

    return shared / (entropy(query) * entropy(key)).sqrt()


def test_nmi_is_one_where_every_query_has_its_key_and_zero_where_all_look_alike() -> None:
    n = 9
    eye, even = torch.eye(n).double(), torch.full((n, n), 1 / n).double()
    one = torch.zeros(n, n).double()
    one[:, 3] = 1
    near = torch.softmax(-(torch.arange(n)[:, None] - torch.arange(n)).abs().double(), -1)
    found = []
    for p in (eye, near, even, one):
        found.append(float(nmi(-torch.xlogy(p, p).sum(-1)[None], p.mean(-2)[None])))
    assert found[0] == pytest.approx(1.0)
    assert 0.1 < found[1] < 0.9
    assert found[2:] == pytest.approx([0.0, 0.0], abs=1e-12)
    measure = m.Locality()
    assert [measure.kind(x) for x in (0.9, 0.09, 0.0)] == ["local", "hybrid", "global"]
    scores = m.Scores("locality", "vision", (0, 3, 5), torch.tensor([[[0.9], [0.1], [0.0]]]))
    assert measure.teacher(scores) == 3
    with pytest.raises(AttnbiasError, match="between 0 and 1"):
        m.Locality(target=2.0)


class TestOffsetHeads(MeasureCase):
    subjects = ("vit",)

    def build(self, subject: Subject) -> Measure:
        return m.OffsetHeads()

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (layers,) = maps.values()
        p = torch.stack(layers, 1)[..., 1:, 1:]  # (images, layers, heads, 16, 16)
        p = p / p.sum(-1, keepdim=True)
        best = torch.zeros(p.shape[:3], dtype=torch.float64)
        for down in (-1, 0, 1):
            for across in (-1, 0, 1):
                if (down, across) == (0, 0):
                    continue
                total = torch.zeros_like(best)
                for query in range(16):
                    row, column = query // 4 + down, query % 4 + across
                    if 0 <= row < 4 and 0 <= column < 4:
                        total += p[..., query, 4 * row + column]
                best = torch.maximum(best, total / 16)
        return best


def test_offset_heads_have_their_offset_and_kind() -> None:
    subject = models.MAKERS["vit"]()
    scores = m.OffsetHeads().measure(subject.model, [subject.inputs])
    details = scores.details
    assert details["maps"].shape == (3, 4, 7, 7)
    assert torch.allclose(details["maps"].sum((-1, -2)), torch.ones(3, 4).double())
    planted = torch.zeros(1, 1, 7, 7).double()
    planted[..., 3, 4] = 0.8
    assert beside(planted, 1).item() == pytest.approx(0.8)
    assert peak(planted)[0, 0].tolist() == [0, 1]
    kinds = {}
    for name, at, off in (("offset local", (3, 4), 0), ("local", (3, 3), 0), ("class", (3, 3), 1)):
        maps = torch.zeros(1, 1, 7, 7).double()
        maps[(0, 0, *at)] = 1.0
        one = m.Scores(
            "offset_heads", "vision", (0,), beside(maps, 1)[None],
            details={"maps": maps, "class": torch.full((1, 1), 0.9 * off)},
        )  # fmt: skip
        kinds[name] = m.OffsetHeads().kind(one, 0, 0)
    assert all(name == kind for name, kind in kinds.items())
    even = m.Scores(
        "offset_heads", "vision", (0,), torch.full((1, 1, 1), 1 / 49),
        details={"maps": torch.full((1, 1, 7, 7), 1 / 49), "class": torch.zeros(1, 1)},
    )  # fmt: skip
    assert m.OffsetHeads().kind(even, 0, 0) == "global"
    with pytest.raises(AttnbiasError, match="reach"):
        m.OffsetHeads(reach=0)


class TestVisualHeads(MeasureCase):
    subjects = ("llava", "qwen2_vl", "gemma3")

    def build(self, subject: Subject) -> Measure:
        return m.VisualHeads()

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (layers,) = maps.values()
        row = torch.stack(layers, 1)[..., -1, 2:6]  # the last token's, over the image
        weight = row.sum(-1)
        p = (row / weight[..., None]).nan_to_num(0.0)  # a window may hide the image: a score of 0
        concentration = 1 + torch.xlogy(p, p).sum(-1) / torch.tensor(4.0).double().log()
        return weight * concentration


def test_visual_heads_take_spans_and_padding_on_both_sides() -> None:
    subject = models.MAKERS["llava"]()
    text = subject.model.model.language_model
    lone = models.Subject("text", ab_head(subject), {})
    ids = models.tokens(1, 16) % 80 + 3
    spans = {"image": (2, 6), "region": (3, 5)}
    measure = m.VisualHeads()
    whole = measure.measure(lone.model, [{"input_ids": ids, "spans": spans}])
    for side in ("left", "right"):
        pad = torch.zeros(1, 3, dtype=torch.long)
        parts = [pad, ids] if side == "left" else [ids, pad]
        mask = torch.cat(
            [torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], 1
        )
        other = torch.cat([torch.cat(parts, 1), models.tokens(1, 19) % 80 + 3])
        given = {
            "input_ids": other, "attention_mask": torch.cat([mask, torch.ones(1, 19).long()]),
            "spans": {"image": [(2, 6), (4, 9)], "region": [(3, 5), None]},
        }  # fmt: skip
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        found = measure.measure(lone.model, [given])
        assert torch.allclose(found.samples[0], whole.samples[0], atol=1e-5)
        assert torch.allclose(found.details["region"][0], whole.details["region"][0], atol=1e-5)
        assert float(found.details["region"][1].abs().max()) == 0.0
    assert (whole.details["region"] <= whole.details["weight"] + 1e-6).all()
    weights = m.VisualHeads(by="weight").measure(lone.model, [{"input_ids": ids, "spans": spans}])
    assert torch.equal(weights.samples, whole.details["weight"])
    assert text is not None
    with pytest.raises(AttnbiasError, match="no image token"):
        measure.measure(subject.model, [{"input_ids": ids % 80}])
    with pytest.raises(AttnbiasError, match="score, weight"):
        m.VisualHeads(by="sum")


def ab_head(subject: Subject) -> torch.nn.Module:
    """The language model of a model of images and text, alone."""
    model: torch.nn.Module = subject.model.model.language_model
    return model


def test_stages_are_thirds_of_the_depth() -> None:
    assert [len(part) for part in visual_heads.stages(range(32))] == [10, 10, 12]
    assert [len(part) for part in visual_heads.stages(range(40))] == [13, 14, 13]
    assert [len(part) for part in visual_heads.stages(range(6))] == [2, 2, 2]
    samples = torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    scores = m.Scores("visual_heads", "text", tuple(range(6)), samples)
    top = m.stage_top(scores, 1, 3)
    others = m.stage_others(scores, 1, top, seed=1)
    assert all(layer in (2, 3) for layer, _ in (*top, *others))
    assert not set(top) & set(others)
    lowest = min(scores.of(*head) for head in top)
    rest = [(layer, h) for layer in (2, 3) for h in range(4) if (layer, h) not in top]
    assert all(scores.of(*head) <= lowest for head in rest)
    with pytest.raises(AttnbiasError, match="other heads"):
        m.stage_others(scores, 1, m.stage_top(scores, 1, 5))


class TestPruningImportance(MeasureCase):
    subjects = ("vit",)
    metric = "probability"

    def build(self, subject: Subject) -> Measure:
        return m.PruningImportance(metric=self.metric)

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [{**subject.inputs, "labels": torch.tensor([3, 5])}]

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [{name: value[n : n + 1] for name, value in given.items()} for n in range(2)]

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        whole = without(subject, [])
        found = torch.zeros(2, 3, 4, dtype=torch.float64)
        for layer in range(3):
            for head in range(4):
                cut = differences(whole, without(subject, [(layer, head)]), torch.tensor([3, 5]))
                found[:, layer, head] = cut[self.metric]
        return found


class TestPruningImportanceByDivergence(TestPruningImportance):
    metric = "divergence"


def without(subject: Subject, heads: list[tuple[int, int]]) -> Tensor:
    """Class probabilities of the eager twin, some heads' inputs to the output projection zero."""
    twin = subject.eager()

    def cut(layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            out = args[0].clone()
            for row, head in heads:
                if row == layer:
                    out[..., 8 * head : 8 * head + 8] = 0
            return (out, *args[1:])

        return hook

    for layer in range(3):
        twin.get_submodule(f"vit.layers.{layer}.attention.o_proj").register_forward_pre_hook(
            cut(layer)
        )
    with torch.no_grad():
        return subject.run(twin).double().softmax(-1)


def test_keeping_a_head_starts_from_a_layer_without_any() -> None:
    subject = models.MAKERS["vit"]()
    labels = torch.tensor([3, 5])
    found = m.PruningImportance(keep=True).measure(
        subject.model, [{**subject.inputs, "labels": labels}]
    )
    bare = without(subject, [(1, head) for head in range(4)])
    kept = without(subject, [(1, head) for head in (0, 1, 3)])
    want = kept[torch.arange(2), labels] - bare[torch.arange(2), labels]
    assert torch.allclose(found.samples[:, 1, 2], want, atol=1e-5)
    assert set(found.details) == {"probability", "loss", "divergence", "accuracy"}


def test_metrics_of_pruning() -> None:
    before = torch.tensor([[0.7, 0.3], [0.4, 0.6]]).double()
    after = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).double()
    found = differences(before, after, torch.tensor([0, 1]))
    assert found["probability"].tolist() == pytest.approx([0.2, 0.5])
    assert found["loss"].tolist() == pytest.approx([0.336472, 1.791759], abs=1e-5)
    assert found["accuracy"].tolist() == [0.0, 1.0]
    middle = (before + after) / 2
    want = [
        sum(
            0.5 * float(p[row, c]) * float((p[row, c] / middle[row, c]).log())
            for p in (before, after) for c in range(2)
        )
        for row in range(2)
    ]  # fmt: skip
    assert found["divergence"].tolist() == pytest.approx(want)


def test_pruning_needs_labels_and_a_metric() -> None:
    subject = models.MAKERS["vit"]()
    with pytest.raises(AttnbiasError, match="labels"):
        m.PruningImportance().measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="one of probability"):
        m.PruningImportance(metric="size")
    given = [{**subject.inputs, "labels": torch.tensor([3, 5])}]
    plain = m.PruningImportance().pruned(subject.model, given, ())
    want = (without(subject, []).argmax(-1) == torch.tensor([3, 5])).double().mean()
    assert plain == pytest.approx(float(want))
