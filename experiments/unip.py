"""Distilling one layer's attention: the layer that NMI-HAD picks beside the other layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from experiments._tiny import schooling
from experiments._vision import CLASSES, Digits, classifier, config, digits
from experiments.common import Experiment

LAYERS = 4


def attentions(teacher: Any, images: Tensor) -> tuple[Tensor, ...]:
    """The maps of every layer, ``(rows, heads, tokens, tokens)``."""
    wise = copy.deepcopy(teacher)
    wise.set_attn_implementation("eager")
    with torch.no_grad():
        found: tuple[Tensor, ...] = wise(pixel_values=images, output_attentions=True).attentions
    return found


def student(seed: int, images: Tensor, maps: Tensor | None, steps: int) -> Any:
    """Two layers, whose last one learns the teacher's maps of the images; None: learns nothing."""
    from transformers import ViTModel

    torch.manual_seed(100 + seed)
    model = ViTModel(config(2, 2, attn_implementation="eager"), add_pooling_layer=False)
    if maps is None:
        return model.eval()
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(model, steps)
    for _ in range(steps):
        rows = torch.randint(len(images), (48,), generator=generator)
        want = maps[rows]
        got = model(pixel_values=images[rows], output_attentions=True).attentions[-1]
        loss = (torch.xlogy(want, want) - want * got.clamp_min(1e-12).log()).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


def probe(model: Any, train: Digits, test: Digits) -> float:
    """Accuracy of a linear (ridge) classifier on the mean of the patches' last hidden states."""

    def read(images: Tensor) -> Tensor:
        with torch.no_grad():
            found = model(pixel_values=images).last_hidden_state[:, 1:].mean(1).double()
        return torch.cat([found, torch.ones_like(found[:, :1])], 1)

    known, fresh = read(train.images), read(test.images)
    want = torch.nn.functional.one_hot(train.labels, CLASSES).double()
    size = known.T @ known
    weight = torch.linalg.solve(size + 1e-2 * torch.eye(len(size)).double(), known.T @ want)
    return float(((fresh @ weight).argmax(-1) == test.labels).double().mean())


@torch.enable_grad()
def measure(seed: int, steps: int = 150) -> dict[str, float]:
    train, test = digits(seed)
    teacher = classifier(seed, layers=LAYERS)
    locality = ab.measures.Locality()
    scores = locality.measure(teacher, [{"pixel_values": train.images[:200]}])
    chosen = locality.teacher(scores)
    maps = attentions(teacher, train.images)
    found = {
        n: probe(student(seed, train.images, maps[n], steps), train, test) for n in range(LAYERS)
    }
    others = [value for layer, value in found.items() if layer != chosen]
    return {
        "effect": found[chosen],
        "control": sum(others) / len(others),
        "best other layer": max(others),
        "not distilled": probe(student(seed, train.images, None, 0), train, test),
        "chosen layer": float(chosen),
        **{f"nmi of layer {n}": float(scores.values[n].mean()) for n in range(LAYERS)},
        **{f"probe of layer {n}": value for n, value in found.items()},
    }


EXPERIMENT = Experiment(
    work="unip",
    claim="A small vision transformer distilled from the attention of the layer whose normalised "
    "mutual information is nearest to 0.09 is read better by a linear probe than one distilled "
    "from another layer.",
    control="the same student distilled as long from each of the other layers, their mean",
    measure=measure,
    seeds=(0, 1, 2, 3),
)
