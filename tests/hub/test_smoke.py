"""Fifteen classes of model, on the oldest and the newest transformers: found, counted, shifted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.hub import attach
from tests.hub.models import build, inputs_of, outputs
from tests.steer import models
from tests.steer.dense import DenseEdit, Map, multiply, rewritten

Made = tuple[nn.Module, dict[str, Tensor]]
CHOSEN = (0, 3, 4)
FACTOR = 4.0  # KeyShift of log 4


@dataclass(frozen=True)
class Kind:
    """A class of model: how to make one, and how many attention layers each tower has."""

    layers: dict[str, int]
    make: Callable[[], Made]


def family(name: str) -> Callable[[], Made]:
    return lambda: (build(name), inputs_of(name))


def subject(name: str) -> Callable[[], Made]:
    def make() -> Made:
        found = models.MAKERS[name]()
        return found.model, found.row(0)  # one image: the vision tower is called once a layer

    return make


TEXT, VISION = {"text": 2}, {"vision": 2}
CLASSES: dict[str, Kind] = {
    "LlamaForCausalLM": Kind(TEXT, family("llama")),
    "Qwen3ForCausalLM": Kind(TEXT, family("qwen3")),
    "MistralForCausalLM": Kind(TEXT, family("mistral")),
    "Gemma3ForConditionalGeneration": Kind({"text": 3, "vision": 2}, subject("gemma3")),
    "GPT2LMHeadModel": Kind(TEXT, family("gpt2")),
    "GPTNeoXForCausalLM": Kind(TEXT, family("neox")),
    "OPTForCausalLM": Kind(TEXT, family("opt")),
    "Phi3ForCausalLM": Kind(TEXT, family("phi3")),
    "GptOssForCausalLM": Kind(TEXT, family("gpt_oss")),
    "BertModel": Kind(TEXT, family("bert")),
    "ViTModel": Kind(VISION, family("vit")),
    "Dinov2Model": Kind(VISION, family("dinov2")),
    "CLIPModel": Kind(TEXT | VISION, family("clip")),
    "LlavaForConditionalGeneration": Kind({"text": 3, "vision": 3}, subject("llava")),
    "Qwen2VLForConditionalGeneration": Kind({"text": 3, "vision": 2}, subject("qwen2_vl")),
}


class See:
    """Sees every call: its map under the edit that the context reports, from scores in float64."""

    role = "see"

    def __init__(self) -> None:
        self.maps: list[tuple[tuple[str, int], Tensor]] = []

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...

    def see(self, call: Any, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        group = call.query.shape[1] // call.key.shape[1]
        key = call.key.double().repeat_interleave(group, 1)
        scores = call.query.double() @ key.mT * call.scale
        for bias in (call.bias, extra):
            scores = scores if bias is None else scores + bias.dense().double()
        if call.sink is not None:
            sink = call.sink.double().reshape(1, -1, 1, 1).expand_as(scores[..., :1])
            scores = torch.cat([scores, sink], -1)
        self.maps.append(
            ((call.site.tower, call.site.layer), scores.softmax(-1)[..., : key.shape[2]])
        )


def chosen(found: Map) -> Tensor:
    return torch.isin(found.positions, torch.tensor(CHOSEN))


def test_the_list_has_fifteen_classes() -> None:
    assert len(CLASSES) == 15
    for name, kind in CLASSES.items():
        assert type(kind.make()[0]).__name__ == name


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_every_attention_layer_is_called_once(name: str) -> None:
    """As many calls as the config has attention layers, and the output is the plain one."""
    kind = CLASSES[name]
    model, inputs = kind.make()
    plain = model(**inputs)[0]
    see = See()
    with attach(model, see):
        found = model(**inputs)[0]
    wanted = [(tower, layer) for tower, count in kind.layers.items() for layer in range(count)]
    assert sorted(place for place, _ in see.maps) == sorted(wanted)
    assert {(site.tower, site.layer) for site in ab.sites(model)} == set(wanted)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_a_shift_moves_the_map_as_the_dense_rewrite_does(name: str) -> None:
    """Log 4 at three keys, all heads and layers of a tower: every map, and the model's output."""
    kind = CLASSES[name]
    model, inputs = kind.make()
    plain = model(**inputs)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for tower in kind.layers:
        rule = ab.rules.KeyShift(keys=list(CHOSEN), factor=FACTOR, heads="all", towers=[tower])
        see = See()
        with ab.steer(model, rule), attach(model, see):
            found = model(**inputs)
        maps: list[Tensor] = []

        def keep(found: Map, maps: list[Tensor] = maps) -> Tensor:
            maps.append(found.probabilities)
            return found.probabilities

        edits = [DenseEdit(multiply(chosen, FACTOR), towers=(tower,)), DenseEdit(keep)]
        with rewritten(eager, edits, lambda count: torch.arange(count)[None]):
            wanted = eager(**inputs)
        assert len(see.maps) == len(maps) == sum(kind.layers.values())
        for (place, ours), dense in zip(see.maps, maps, strict=True):
            assert float((ours - dense).abs().max()) < 1e-4, place
        moved = 0.0
        for one, two, old in zip(*map(outputs, (found, wanted, plain)), strict=True):
            if not two.is_floating_point():  # Qwen2-VL's offsets of positions
                assert torch.equal(one, two)
                continue
            size = float(two.abs().max())
            assert float((one - two).abs().max()) < 1e-4 * size
            moved = max(moved, float((old - two).abs().max()) / size)
        assert moved > 3e-3
