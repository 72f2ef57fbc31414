"""Positional heads of a decoder that copies from a fixed distance, far or near: masked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures import PositionalHeads
from experiments._induction import LENGTH, VOCABULARY, decoder
from experiments.common import Experiment

FAR, NEAR, ROWS, STEPS = 16, 3, 64, 400
HALF = VOCABULARY // 2  # the tokens of far texts are below, those of near texts above


def texts(rows: int, period: int, generator: torch.Generator) -> Tensor:
    """Random tokens of the period's own half of the vocabulary that come again and again."""
    low, high = (1, HALF) if period == FAR else (HALF, VOCABULARY)
    tokens = torch.randint(low, high, (rows, period), generator=generator)
    again = tokens.repeat(1, LENGTH // period + 1)[:, :LENGTH]
    return torch.cat([again.new_zeros(rows, 1), again], 1)


@lru_cache(maxsize=8)
@torch.enable_grad()
def trained(seed: int) -> Any:
    """One layer of four heads: a token says how far back to look, and not at what."""
    model = decoder(seed, 1, 4)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    for _ in range(STEPS):
        ids = torch.cat([texts(24, FAR, generator), texts(8, NEAR, generator)])
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        plan.step()
    return model.eval()


@torch.no_grad()
def loss(model: Any, ids: Tensor, heads: Any = None) -> float:
    """Mean loss (nats) of the tokens that have come before in texts of either distance."""
    rule = ab.rules.BlockHeads(heads=heads or "all", mode="uniform" if heads else None)
    with ab.steer(model, rule):
        logits = model(ids).logits[:, FAR:-1]
    want = ids[:, FAR + 1 :]
    return float(torch.nn.functional.cross_entropy(logits.transpose(1, 2), want))


def measure(seed: int) -> Mapping[str, float]:
    """How much the loss of far copies grows without the head of the highest score."""
    model = trained(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    far, near = (texts(ROWS, period, generator) for period in (FAR, NEAR))
    data = [{"input_ids": torch.cat([far[:4], near[:4]])}]
    scores = PositionalHeads().measure(model, data)
    plain, plain_near = loss(model, far), loss(model, near)
    top = scores.top(1)
    others = [(head,) for head in scores.heads if head not in top]
    damage = [loss(model, far, heads) - plain for heads in others]
    damage_near = [loss(model, near, heads) - plain_near for heads in others]
    return {
        "effect": loss(model, far, top) - plain,
        "control": sum(damage) / len(damage),
        "most of the others": max(damage),
        "near, positional": loss(model, near, top) - plain_near,
        "near, others": sum(damage_near) / len(damage_near),
        "plain": plain,
        "plain, near": plain_near,
        "best score": scores.of(*top[0]),
        "second score": scores.of(*scores.ranked()[1]),
    }


EXPERIMENT = Experiment(
    work="rope-positional-heads",
    claim=(
        "In a decoder of one layer trained here to copy from 16 or from 3 tokens before, masking "
        "the head whose leading rotary dimension grows most with the distance raises the loss of "
        "far copies more than masking another."
    ),
    control="Each of the other three heads masked in the same way, the mean over them.",
    measure=measure,
)
