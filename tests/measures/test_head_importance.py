"""Importance of heads beside plain PyTorch: hooks on the modules of an eager model in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.measures import HeadAblation, HeadImportance, Measure
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

Gate = Callable[[int, int, Tensor], Tensor]  # row, layer, (1, tokens, heads, size)


def targets(subject: Subject) -> list[ab.hub.Site]:
    found = ab.sites(subject.model)
    tower = "text" if any(site.tower == "text" for site in found) else found[0].tower
    return [site for site in found if site.tower == tower]


def pooled(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """A loss for models without one: it reads real tokens only."""
    hidden: Tensor = (
        outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state
    ).double()
    if hidden.ndim == 2:
        return hidden[:, 0] - 0.5 * hidden[:, 1].square()
    mask = inputs.get("attention_mask")
    real = torch.ones(hidden.shape[:2]) if mask is None else mask
    weight = real.to(hidden) * (1 + real.cumsum(-1) % 3)
    size = torch.linspace(-1, 1, hidden.shape[-1]).to(hidden)
    return 0.05 * (hidden @ size * weight).sum(1) / weight.sum(1)


def dense_loss(
    subject: Subject, gate: Gate, inputs: Mapping[str, Any], loss: Any = pooled
) -> Tensor:
    """The loss of each row by the eager float64 twin, alone and without its padding, with the head
    outputs passed through `gate`."""
    twin = copy.deepcopy(subject.model).double()
    twin.set_attn_implementation("eager")  # type: ignore[operator]
    turn = [0]
    for site in targets(subject):
        module: Any = twin.get_submodule(site.name)
        size = getattr(module, "head_dim", None) or module.attention_head_size

        def split(out: Tensor, layer: int = site.layer, size: int = size) -> Tensor:
            heads = out.reshape(*out.shape[:-1], -1, size)
            return gate(turn[0], layer, heads).flatten(-2)

        if hasattr(module, "o_proj"):
            module.o_proj.register_forward_pre_hook(lambda _, args, f=split: (f(args[0]),))
        else:
            module.register_forward_hook(lambda _, args, out, f=split: (f(out[0]), *out[1:]))
    found = []
    for row in range(2):
        turn[0] = row
        one = subject.row(row, **inputs)
        if "attention_mask" in one:
            real = one.pop("attention_mask")[0].bool()
            one = {k: v[:, real] for k, v in one.items()}
        one = {k: v.double() if v.is_floating_point() else v for k, v in one.items()}
        found.append(loss(twin(**one), one)[0])
    return torch.stack(found)


def padded(subject: Subject, side: str) -> dict[str, Any]:
    """The inputs with three tokens of the second row made padding."""
    given: dict[str, Any] = dict(subject.inputs)
    if "input_ids" in given and subject.name != "llava":
        mask = torch.ones_like(given["input_ids"])
        mask[1, slice(None, 3) if side == "left" else slice(-3, None)] = 0
        given["attention_mask"] = mask
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    return given


class Padded(MeasureCase):
    side = "right"
    tolerance = 5e-5  # float32 backward through sharpened heads

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [padded(subject, self.side)]


class TestHeadImportance(Padded):
    normalise = False

    def build(self, subject: Subject) -> Measure:
        return HeadImportance(loss=pooled, normalise=self.normalise)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        gates = {
            s.layer: torch.ones(2, p.shape[1], dtype=torch.float64, requires_grad=True)
            for s, p in zip(targets(subject), next(iter(maps.values())), strict=True)
        }
        (inputs,) = self.data(subject)
        total = dense_loss(subject, lambda row, at, out: out * gates[at][row][:, None], inputs)
        slopes = torch.autograd.grad(total.sum(), list(gates.values()))
        scores = torch.stack([slope.abs() for slope in slopes], 1)
        if self.normalise:
            scores = scores / scores.mean(0).square().sum(-1).sqrt()[None, :, None]
        return scores


class TestNormalised(TestHeadImportance):
    side, normalise = "left", True


class TestHeadAblation(Padded):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "vit", "llava")
    side = "left"

    def build(self, subject: Subject) -> Measure:
        return HeadAblation(loss=pooled)

    def kept(self, head: int, heads: int) -> Tensor:
        return (torch.arange(heads) != head).double()

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (inputs,) = self.data(subject)
        with torch.no_grad():
            plain = dense_loss(subject, lambda row, layer, out: out, inputs)
            rows = []
            for site, p in zip(targets(subject), next(iter(maps.values())), strict=True):
                row = []
                for head in range(p.shape[1]):
                    keep = self.kept(head, p.shape[1])[:, None]

                    def gate(_: int, layer: int, out: Tensor) -> Tensor:
                        return out * keep if layer == site.layer else out  # noqa: B023

                    row.append(dense_loss(subject, gate, inputs) - plain)
                rows.append(torch.stack(row, -1))
        return torch.stack(rows, 1)


class TestAllButOne(TestHeadAblation):
    subjects: ClassVar[tuple[str, ...]] = ("stories", "llava")

    def build(self, subject: Subject) -> Measure:
        return HeadAblation(mode="all but one", loss=pooled)

    def kept(self, head: int, heads: int) -> Tensor:
        return (torch.arange(heads) == head).double()


def test_it_is_the_slope_of_the_loss(request: pytest.FixtureRequest) -> None:
    """Finite differences of the loss by one gate, with the model's own next-token loss."""
    subject = models.make("stories", request)
    inputs = padded(subject, "left")
    scores = HeadImportance(normalise=False).measure(subject.model, [inputs])

    def next_token(outputs: Any, row: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(outputs.logits[0, :-1], row["input_ids"][0, 1:])[None]

    def loss(size: float) -> Tensor:
        step = torch.zeros(8, 1, dtype=torch.float64)
        step[3] = size
        gate = lambda row, layer, out: out * (1 + step * (layer == 2))  # noqa: E731
        with torch.no_grad():
            return dense_loss(subject, gate, inputs, next_token)

    slope = (loss(3e-3) - loss(-3e-3)).abs() / 6e-3  # the eager softmax is float32
    assert torch.allclose(scores.samples[:, 2, 3], slope, atol=3e-4)


def test_what_has_no_loss_says_so(request: pytest.FixtureRequest) -> None:
    subject = models.make("minilm", request)
    with pytest.raises(AttnbiasError, match="loss=function"):
        HeadImportance().measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="one number a row"):
        HeadImportance(loss=lambda out, _: out.last_hidden_state.sum()).measure(
            subject.model, [subject.inputs]
        )
    with pytest.raises(AttnbiasError, match="tower must be one of text"):
        HeadImportance(tower="vision").measure(subject.model, [subject.inputs])
    with pytest.raises(AttnbiasError, match="mode"):
        HeadAblation(mode="two")  # type: ignore[arg-type]
