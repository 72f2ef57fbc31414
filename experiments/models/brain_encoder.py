"""Encoders of simulated voxels: routed by attention, by a static map, or linear in all features."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnbias_models.training import Plan, seeded, train
from attnbias_models.vision.brain import BrainEncoder, BrainEncoderConfig
from attnbias_models.vision.responses import EncodeTask, Responses, explained, predicted, ridge
from attnbias_models.vision.simulated import moving_voxels
from experiments.grid import Claim, Grid

VARIANTS = ("attention", "static", "linear", "ridge")
FIXED = ", fixed places"  # the same encoder where places do not move, with a search of its own
# Tried by the closed form on the validation images: more than the others' rates.
PENALTIES = tuple(10.0**power for power in range(-3, 4))


def small(route: str, data: Responses) -> BrainEncoderConfig:
    """An encoder of 8 x 8 places and 16 features."""
    _, channels, height, width = data.features.shape
    return BrainEncoderConfig(
        areas=data.areas,
        channels=channels,
        grid=(height, width),
        width=32,
        heads=2,
        hidden=64,
        route=route,
    )


def fitted(
    variant: str, rate: float, seed: int, steps: int, *, moving: bool, images: int = 3000
) -> dict[str, float]:
    data, places = moving_voxels(images, seed, moving=moving)
    cuts = (0, images // 2, images * 2 // 3, images)
    rows = [torch.arange(first, last) for first, last in itertools.pairwise(cuts)]
    train_, valid, test = (data.rows(part) for part in rows)
    if variant == "ridge":
        loss, penalty = min(
            (float((ridge(train_, valid, one) - valid.responses).square().mean()), one)
            for one in PENALTIES
        )
        found = explained(ridge(train_, test, penalty), test.responses).mean()
        return {"validation": loss, "r2": float(found)}
    model = seeded(lambda: BrainEncoder(small(variant, data)), seed)
    plan = Plan(
        steps=steps,
        learning_rate=rate,
        weight_decay=1e-4,
        schedule="cosine",
        validate_every=50,
        seed=seed,
    )
    history = train(model, EncodeTask(train_, valid, batch=64, seed=seed), plan, progress=False)
    numbers = {
        "validation": history.best,
        "r2": float(explained(predicted(model, test.features), test.responses).mean()),
    }
    if variant != "linear":
        numbers["hits"] = hits(model, test.features, places[rows[2]])
    return numbers


def hits(model: BrainEncoder, features: Tensor, places: Tensor) -> float:
    """How often the strongest place of an area's map is the planted one."""
    with torch.no_grad():
        found = model.maps(features).flatten(2).argmax(-1)
    return float((found == places).double().mean())


def measure(variant: str, setting: Mapping[str, Any], seed: int) -> Mapping[str, float]:
    torch.set_num_threads(1)
    route, fixed, _ = variant.partition(FIXED)
    return fitted(route, setting["learning_rate"], seed, 500, moving=not fixed)


def reduced(seed: int) -> Mapping[str, float]:
    torch.set_num_threads(1)
    found = fitted("attention", 1e-2, seed, 250, moving=True, images=1800)
    static = fitted("static", 1e-2, seed, 50, moving=True, images=1800)
    return {"r2": found["r2"], "hits": found["hits"], "r2_static": static["r2"]}


GRIDS = (
    Grid(
        name="brain_encoder",
        work="transformer-brain-encoder",
        question="Does routing by content predict voxels whose content moves about the image?",
        data=(
            "generated: 32 voxels of 4 areas answer to the content at a marked place, drawn anew "
            "for each image (8 x 8 places, 16 features), with noise that leaves 0.8 of the "
            "variance to explain; 1,500 images to train on, 500 to validate, 1,000 to test; "
            "and the same with places that are the same in all images"
        ),
        variants=(*VARIANTS, *(f"{variant}{FIXED}" for variant in VARIANTS)),
        measure=measure,
        claims=(
            Claim("Attention explains more than static maps", "r2", "attention", "static", False),
            Claim(
                "Attention explains more than a linear model", "r2", "attention", "linear", False
            ),
            Claim(
                "Attention explains more than ridge regression", "r2", "attention", "ridge", False
            ),
            Claim("Its maps hit the planted place", "hits", "attention", "static", False, 0.5),
            Claim(
                "Where places are fixed, it is no worse than static maps by 0.02",
                "r2",
                f"attention{FIXED}",
                f"static{FIXED}",
                False,
                -0.02,
            ),
        ),
        search=tuple({"learning_rate": rate} for rate in (3e-3, 1e-2, 3e-2)),
        seeds=(0, 1, 2, 3, 4),
        tried=3,  # a rate that serves one seed may fail the next
        reduced=reduced,
        note=(
            "Simulated, and made so that a place moves: it shows that the encoder does what it is "
            "for, not that brains do it. Voxels of one area share a place. Ridge regression has "
            "seven penalties to choose from on the validation images, and takes no rate. "
            "hits of a linear model and of ridge regression do not exist. Rates are searched over "
            "three seeds: over one, the search took a rate for attention at which other seeds miss "
            "half of their places (R2 0.61 in place of 0.78)."
        ),
    ),
)
