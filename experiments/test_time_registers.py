"""Test-time registers on a vision transformer of digits with register neurons planted in it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.steer.states import collect
from experiments.common import Experiment

WIDTH, LAYERS, UNITS, PLACE = 32, 4, 64, 1
REGISTERS, DECOYS = (5, 20, 41), (7, 33, 50)
CORNER, OTHER = 1, 16  # the tokens that the planted neurons and the decoys fire on
LOUD = 40.0  # the norm that the planted neurons write together


@dataclass(frozen=True)
class Planted:
    """A classifier with outliers, its train and test images, and the labels of the latter."""

    model: Any
    train: Tensor
    test: Tensor
    labels: Tensor

    @property
    def neurons(self) -> tuple[tuple[int, int], ...]:
        """The register neurons that were planted, as (layer, unit)."""
        return tuple((PLACE, unit) for unit in REGISTERS)


@functools.lru_cache(maxsize=2)
def planted(seed: int) -> Planted:
    """Train on digits, plant three register neurons among three decoys, train on around them.

    The planted units fire on one background corner patch and write one direction far beyond all
    other norms; later layers are given keys that draw attention to that direction and values that
    ignore it, and learn on with such a sink. The decoys fire as strongly on another patch.
    """
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    generator = torch.Generator().manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=generator)
    pixels = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1)[order]
    labels = torch.tensor(digits.target)[order]
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=UNITS,
        image_size=8,
        patch_size=2,
        num_channels=1,
        num_labels=10,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ViTForImageClassification(config)
    train, test = pixels[:1400], pixels[1400:]
    _train(model, train, labels[:1400], list(model.parameters()), 200, 4e-3, generator)
    _plant(model, train[:300], generator)
    early = {id(p) for layer in model.vit.layers[: PLACE + 1] for p in layer.parameters()}
    early |= {id(p) for p in model.vit.embeddings.parameters()}
    later = [p for p in model.parameters() if id(p) not in early]
    _train(model, train, labels[:1400], later, 120, 3e-3, generator)
    return Planted(model.eval(), train, test, labels[1400:])


def _train(
    model: Any,
    pixels: Tensor,
    labels: Tensor,
    parameters: list[nn.Parameter],
    steps: int,
    rate: float,
    generator: torch.Generator,
) -> None:
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(0, len(pixels), (64,), generator=generator)
        loss = nn.functional.cross_entropy(model(pixels[rows]).logits, labels[rows])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def _plant(model: Any, images: Tensor, generator: torch.Generator) -> None:
    layer = model.vit.layers[PLACE]
    seen: list[Tensor] = []
    handle = layer.mlp.fc1.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model(images)
    handle.remove()
    inputs = seen[0].double()  # (images, tokens, width)
    fc1, fc2 = layer.mlp.fc1, layer.mlp.fc2
    direction = torch.randn(WIDTH, generator=generator)
    direction = direction - direction.mean()
    direction /= direction.norm()
    for units, token, loud in ((REGISTERS, CORNER, LOUD), (DECOYS, OTHER, 0.0)):
        target = torch.zeros(inputs.shape[:2], dtype=torch.float64)
        target[:, token] = 1.0
        whole = torch.cat([inputs, torch.ones_like(inputs[..., :1])], -1).flatten(0, 1)
        ridge = whole.T @ whole + 1e-3 * torch.eye(WIDTH + 1, dtype=torch.float64)
        found = torch.linalg.solve(ridge, whole.T @ target.flatten())
        given = (whole @ found).reshape(target.shape)
        low, high = given[target == 0].mean(), given[target == 1].mean()
        scale = 10 / (high - low)
        for unit in units:  # 6 on its token before the activation, -4 on the others
            fc1.weight[unit] = (scale * found[:-1]).float()
            fc1.bias[unit] = float(scale * (found[-1] - low) - 4)
            fc2.weight[:, unit] = loud / (6 * len(units)) * direction
    for after in model.vit.layers[PLACE + 1 :]:
        core = after.attention
        gamma = after.layernorm_before.weight
        pull = torch.randn(4, WIDTH // 4, generator=generator)
        pull = (pull / pull.norm(dim=1, keepdim=True)).flatten()
        core.k_proj.weight += torch.outer(pull, direction / gamma) * 1.4
        core.q_proj.bias += pull * 1.4
        core.v_proj.weight -= torch.outer(
            core.v_proj.weight @ (direction * gamma), direction / gamma
        )


def _under(model: Any, rule: ab.steer.Rule | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if rule is None else ab.steer(model, rule)


def norms(model: Any, pixels: Tensor, rule: ab.steer.Rule | None) -> Tensor:
    """The norms of the patches ``(images, patches)`` after the last layer but one."""
    with _under(model, rule):
        found = collect(
            model,
            {"pixel_values": pixels},
            layers=(LAYERS - 2,),
            keep=lambda site, hidden: hidden[:, 1 : site.length].norm(dim=-1),
        )
    return found[0].hidden


@torch.no_grad()
def attention_on(model: Any, pixels: Tensor, rule: ab.steer.Rule | None, token: int) -> float:
    """The share of all attention that a token gets in the last two layers."""
    with (
        _under(model, rule),
        ab.observe(model, [ab.statistics.Received(denominator="queries")]) as seen,
    ):
        model(pixels)
    return float(seen.tensor("received").values[0, LAYERS - 2 :, :, :, token].mean())


@torch.no_grad()
def classes(model: Any, pixels: Tensor, rule: ab.steer.Rule | None) -> Tensor:
    """The predicted classes."""
    with _under(model, rule):
        return torch.as_tensor(model(pixels).logits.argmax(-1))


def measure(seed: int) -> Mapping[str, float]:
    """Register neurons found on training images, moved on others; random neurons beside them."""
    made = planted(seed)
    model, images = made.model, made.test
    rule = ab.rules.TestTimeRegisters().fit(
        model, made.train[:300], top_k=len(REGISTERS), detect_layer=-2, progress=False
    )
    generator = torch.Generator().manual_seed(seed)
    units = [int(u) for u in torch.randperm(UNITS, generator=generator) if u not in REGISTERS]
    randomly = tuple((PLACE, unit) for unit in units[: len(REGISTERS)])
    other = ab.rules.TestTimeRegisters(neurons=randomly)
    silenced = ab.rules.TestTimeRegisters(neurons=rule.neurons, num_registers=0)
    before = float(norms(model, images, None).max())
    plain = classes(model, images, None)

    def fall(rule: ab.steer.Rule) -> float:
        return 1 - float(norms(model, images, rule).max()) / before

    def agree(rule: ab.steer.Rule) -> float:
        return float((classes(model, images, rule) == plain).double().mean())

    added = images.shape[-1] // 2 * images.shape[-2] // 2 + 1
    return {
        "effect": fall(rule),
        "control": fall(other),
        "found": len(set(rule.neurons or ()) & set(made.neurons)) / len(REGISTERS),
        "largest_norm": before,
        "attention_on_outliers": attention_on(model, images, None, CORNER),
        "attention_on_register": attention_on(model, images, rule, added),
        "attention_on_register_random": attention_on(model, images, other, added),
        "attention_left_on_outliers": attention_on(model, images, rule, CORNER),
        "same_class": agree(rule),
        "same_class_no_register": agree(silenced),
        "accuracy": float((plain == made.labels).double().mean()),
    }


EXPERIMENT = Experiment(
    work="test-time-registers",
    claim="Moving the activation of the register neurons that the search finds to one added token "
    "removes the outliers among patch norms (fall of the largest, as a share); the added token "
    "takes their attention and the classes stay.",
    control="As many random neurons of the same layer with an added token; for the classes, the "
    "same register neurons silenced without a register.",
    measure=measure,
)
