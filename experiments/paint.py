"""PAINT on a tiny captioner: the image tokens that its vision tower points at, beside others."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.steer.rules.paint import tokens as chosen_tokens
from experiments.common import Experiment

SIDE, KINDS, SHOWN, NOISE = 5, 8, 3, 0.8
PATCHES = SIDE * SIDE
BOS, IMAGE, SO, OBJECT = 0, 1, 2, 3
VOCABULARY = OBJECT + KINDS
TOGETHER = 0.85  # how often an object comes with its partner where the captioner learns
STEPS, BATCH, TEST = 300, 32, 32
ALPHA, BETA = 0.7, 0.3


def scenes(rows: int, generator: torch.Generator, together: float) -> tuple[Tensor, Tensor]:
    """Images ``(rows, 3, pixels, pixels)`` of three objects, and the objects in reading order."""
    patterns = torch.randn(KINDS, 3, 2, 2, generator=torch.Generator().manual_seed(99))
    images = NOISE * torch.randn(rows, 3, 2 * SIDE, 2 * SIDE, generator=generator)
    names = torch.zeros(rows, SHOWN, dtype=torch.long)
    for row in range(rows):
        order = torch.randperm(KINDS, generator=generator).tolist()
        first = order[0]
        mate = first ^ 1
        rest = [kind for kind in order if kind not in (first, mate)]
        paired = float(torch.rand(1, generator=generator)) < together
        kinds = [first, mate, rest[0]] if paired else [first, *rest[:2]]
        if not paired:  # no partner of any: the third is of another pair than the second
            kinds[2] = next(kind for kind in rest[1:] if kind != rest[0] ^ 1)
        places = torch.randperm(PATCHES, generator=generator)[:SHOWN].sort().values.tolist()
        kinds = [kinds[i] for i in torch.randperm(SHOWN, generator=generator).tolist()]
        for place, kind in zip(places, kinds, strict=True):
            top, left = 2 * (place // SIDE), 2 * (place % SIDE)
            images[row, :, top : top + 2, left : left + 2] += patterns[kind]
        names[row] = torch.tensor(kinds)
    return images, names


def prompts(names: Tensor, said: int) -> Tensor:
    """``BOS | image | SO | the first objects``."""
    rows = len(names)
    parts = [torch.full((rows, count), token) for token, count in ((BOS, 1), (IMAGE, PATCHES))]
    return torch.cat([*parts, torch.full((rows, 1), SO), OBJECT + names[:, :said]], 1)


def untrained(seed: int) -> Any:
    """The captioner before its training."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    vision = {"model_type": "clip_vision_model", "image_size": 2 * SIDE, "patch_size": 2}
    text = {"model_type": "llama", "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    text |= {"bos_token_id": BOS, "eos_token_id": None, "pad_token_id": None}
    config = LlavaConfig(
        vision_config=vision | sizes | {"num_hidden_layers": 3},
        text_config=text | sizes | {"num_hidden_layers": 2},
        image_token_index=IMAGE,
        image_seq_length=PATCHES,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config).eval()


@lru_cache(maxsize=8)
def trained(seed: int) -> Any:
    """A captioner whose vision tower also names the objects from its class token."""
    model = untrained(seed).train()
    head = nn.Linear(32, KINDS)
    tower = model.model.vision_tower
    generator = torch.Generator().manual_seed(seed)
    images, names = scenes(1200, generator, TOGETHER)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    for _ in range(STEPS):
        some = torch.randint(len(images), (BATCH,), generator=generator)
        ids = prompts(names[some], SHOWN)
        scores = model(input_ids=ids, pixel_values=images[some]).logits[:, -SHOWN - 1 : -1]
        target = names[some] + OBJECT
        loss = nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten())
        there = torch.zeros(BATCH, KINDS).scatter(1, names[some], 1.0)
        told = head(tower(images[some]).last_hidden_state[:, 0])
        loss = loss + nn.functional.binary_cross_entropy_with_logits(told, there)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


@torch.no_grad()
def grounded(model: Any, images: Tensor, names: Tensor, rules: Any) -> float:
    """Mean log-odds (nats) of objects that are there and not yet said over those that are not.

    rules: one rule for each row, or a single one, or None.
    """
    found = []
    for said in range(SHOWN):
        ids = prompts(names, said)
        for row in range(len(ids)):
            rule = rules[row] if isinstance(rules, list) else rules
            spans = {"image": (1, 1 + PATCHES)}
            context = (
                contextlib.nullcontext() if rule is None else ab.steer(model, rule, spans=spans)
            )
            with context:
                inputs = {"input_ids": ids[row : row + 1], "pixel_values": images[row : row + 1]}
                logs = model(**inputs).logits[0, -1, OBJECT:].log_softmax(-1)
            left = torch.zeros(KINDS, dtype=torch.bool)
            left[names[row, said:]] = True
            absent = torch.ones(KINDS, dtype=torch.bool)
            absent[names[row]] = False
            found.append(float(logs[left].logsumexp(0) - logs[absent].logsumexp(0)))
    return sum(found) / len(found)


@torch.no_grad()
def pointed_at(model: Any, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Local and summary patches of each image, by the maps of the vision tower."""
    model.set_attn_implementation("eager")
    maps = model.model.vision_tower(images, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    first, last = (maps[at][:, :, 0, 1:].sum(1) for at in (0, -2))
    return list(zip(*chosen_tokens(first, last, 0.25), strict=True))


def elsewhere(model: Any, images: Tensor, seed: int) -> list[ab.rules.PAINT]:
    """For each image the same edit on as many other image tokens, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    rules = []
    for local, summary in pointed_at(model, images):
        free = (~(local | summary)).nonzero()[:, 0]
        order = free[torch.randperm(len(free), generator=generator)] + 1
        many, few = int(local.sum()), int(summary.sum())
        rules.append(
            ab.rules.PAINT(
                alpha=ALPHA,
                beta=BETA,
                local=order[:many].tolist(),
                summary=order[many : many + max(few, 1)].tolist(),
                heads="all",
                towers=("text",),
            )
        )
    return rules


def measure(seed: int) -> Mapping[str, float]:
    """How far the next object moves to those that the image shows, on scenes without partners."""
    model = trained(seed)
    images, names = scenes(TEST, torch.Generator().manual_seed(seed + 1000), 0.0)
    rule = ab.rules.PAINT(alpha=ALPHA, beta=BETA, heads="all", towers=("vision", "text"))
    plain = grounded(model, images, names, None)
    return {
        "effect": grounded(model, images, names, rule) - plain,
        "control": grounded(model, images, names, elsewhere(model, images, seed)) - plain,
        "plain": plain,
    }


EXPERIMENT = Experiment(
    work="paint",
    claim=(
        "With its default strengths PAINT moves a captioner, on scenes that break the pairs it "
        "has learnt, towards the objects that the image shows."
    ),
    control="The same strengths on as many image tokens that the vision tower does not point at.",
    measure=measure,
    seeds=(0, 1, 2),
)
