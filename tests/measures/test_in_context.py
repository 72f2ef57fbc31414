"""The in-context score and its ablations, beside a Llama forward written out by hand."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.measures import InContextAblation, InContextScore, Measure
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

EARLY, LATE = 3, 9
HEADS = ((0, 1), (1, 2))


def by_hand(model: Any, ids: Tensor, maps: list[Tensor], heads: Any) -> Tensor:
    """The loss of every token, with given patterns and some heads' outputs zero."""
    base = model.model
    hidden = base.embed_tokens(ids)
    for number, layer in enumerate(base.layers):
        normed = layer.input_layernorm(hidden)
        value = layer.self_attn.v_proj(normed).unflatten(-1, (-1, layer.self_attn.head_dim))
        value = value.transpose(1, 2)
        value = value.repeat_interleave(maps[number].shape[1] // value.shape[1], 1)
        out = maps[number].to(value) @ value
        for at, head in heads:
            if at == number:
                out[:, head] = 0
        hidden = hidden + layer.self_attn.o_proj(out.transpose(1, 2).flatten(-2))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logs = model.lm_head(base.norm(hidden)).double().log_softmax(-1)
    return -logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def plain_losses(model: Any, ids: Tensor, heads: Any) -> Tensor:
    """The same with attention free: plain hooks on the output projections."""
    handles = []
    for number, layer in enumerate(model.model.layers):
        width = layer.self_attn.head_dim

        def cut(m: nn.Module, args: Any, at: int = number, width: int = width) -> Any:
            out = args[0].clone()
            for place, head in heads:
                if place == at:
                    out[..., head * width : (head + 1) * width] = 0
            return (out,)

        handles.append(layer.self_attn.o_proj.register_forward_pre_hook(cut))
    with torch.no_grad():
        logs = model(ids).logits.double().log_softmax(-1)
    for handle in handles:
        handle.remove()
    return -logs[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


def score(losses: Tensor) -> Tensor:
    return losses[:, LATE - 1] - losses[:, EARLY - 1]  # losses begin at token 1


class TestInContextScore(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "mistral")
    patterns: ClassVar[Any] = "held"
    heads: ClassVar[Any] = HEADS

    def build(self, subject: Subject) -> Measure:
        return InContextScore(EARLY, LATE, self.heads, self.patterns)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        ids = subject.inputs["input_ids"]
        with torch.no_grad():
            found = by_hand(subject.model, ids, maps["text"], self.heads)
        return score(found)


class TestFree(TestInContextScore):
    patterns: ClassVar[Any] = "free"

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        return score(plain_losses(subject.model, subject.inputs["input_ids"], self.heads))


class TestWhole(TestFree):
    heads: ClassVar[Any] = ()


class TestInContextAblation(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("mistral",)
    tolerance: ClassVar[float] = 2e-5

    def build(self, subject: Subject) -> Measure:
        return InContextAblation(EARLY, LATE)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        ids, layers = subject.inputs["input_ids"], maps["text"]
        plain = score(plain_losses(subject.model, ids, ()))
        found = torch.zeros(len(ids), len(layers), layers[0].shape[1], dtype=torch.float64)
        for layer, head in torch.cartesian_prod(*map(torch.arange, found.shape[1:])).tolist():
            with torch.no_grad():
                lost = by_hand(subject.model, ids, layers, ((layer, head),))
            found[:, layer, head] = score(lost) - plain
        return found


class TestFreeAblation(TestInContextAblation):
    def build(self, subject: Subject) -> Measure:
        return InContextAblation(EARLY, LATE, "free")

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        ids, layers = subject.inputs["input_ids"], maps["text"]
        plain = score(plain_losses(subject.model, ids, ()))
        found = torch.zeros(len(ids), len(layers), layers[0].shape[1], dtype=torch.float64)
        for layer, head in torch.cartesian_prod(*map(torch.arange, found.shape[1:])).tolist():
            lost = plain_losses(subject.model, ids, ((layer, head),))
            found[:, layer, head] = score(lost) - plain
        return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("heads", [(), HEADS])
def test_padding_is_not_counted(stories: Any, side: str, heads: Any) -> None:
    subject = models.stories(stories)
    ids = subject.inputs["input_ids"]
    pad, keep = torch.zeros(1, 2, dtype=torch.long), ids[1:, :11]
    row = torch.cat([pad, keep] if side == "left" else [keep, pad], 1)
    mask = torch.ones(2, 13, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(11, 13)] = 0
    both = {"input_ids": torch.cat([ids[:1], row]), "attention_mask": mask}
    measure = InContextScore(EARLY, LATE, heads)
    found = measure.measure(subject.model, [both])
    parts = [{"input_ids": ids[:1]}, {"input_ids": keep}]
    alone = measure.measure(subject.model, parts)
    assert torch.allclose(found.samples, alone.samples, atol=1e-5)
    assert torch.equal(found.losses.isnan(), alone.losses.isnan())
    assert found.losses.shape == (2, 13)
    assert found.losses[1, 11:].isnan().all()
    assert found.score == pytest.approx(float(found.samples.mean()))
    assert found.error == pytest.approx(float(found.samples.std() / 2**0.5))


def test_held_patterns_are_not_free_ones(stories: Any) -> None:
    subject = models.stories(stories)
    held = InContextScore(EARLY, LATE, HEADS).measure(subject.model, [subject.inputs])
    free = InContextScore(EARLY, LATE, HEADS, "free").measure(subject.model, [subject.inputs])
    assert not torch.allclose(held.samples, free.samples, atol=1e-3)


def test_what_it_refuses(stories: Any) -> None:
    for early, late in ((5, 5), (0, 4), (6, 4), (1.0, 4)):
        with pytest.raises(AttnbiasError, match="early"):
            InContextScore(early, late)  # type: ignore[arg-type]
    with pytest.raises(AttnbiasError, match="patterns"):
        InContextAblation(patterns="kept")  # type: ignore[arg-type]
    with pytest.raises(AttnbiasError, match="pairs"):
        InContextScore(heads=(3,))  # type: ignore[arg-type]
    subject = models.stories(stories)
    with pytest.raises(AttnbiasError, match="place 500"):
        InContextScore().measure(subject.model, [subject.inputs])
    with pytest.raises(Refused, match="one tower of text"):
        InContextScore().measure(models.vit().model, [models.vit().inputs])
    assert ab.measures.InContextScore is InContextScore
