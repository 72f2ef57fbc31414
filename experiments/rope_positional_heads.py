"""Positional heads of a real decoder masked where a text has to be copied from far back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures import PositionalHeads
from experiments.adaptive_long_context_heads import texts
from experiments.common import Experiment
from experiments.zerotuning import _loaded

HEADS, DRAWS, PART, GAP, SKIP = 6, 10, 32, 96, 4


@torch.no_grad()
def losses(ids: Tensor, heads: Any = None) -> tuple[float, float]:
    """Mean loss (nats) of a passage that stood in the text before, and of its first occurrence."""
    model, _ = _loaded()
    rule = ab.rules.BlockHeads(heads=heads or "all", mode="uniform" if heads else None)
    with ab.steer(model, rule):
        logits = model(ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], reduction="none"
    ).mean(0)
    first, again = slice(SKIP, PART), slice(PART + GAP + SKIP, 2 * PART + GAP)
    return float(each[again].mean()), float(each[first].mean())


def measure(seed: int) -> Mapping[str, float]:
    """How much the loss of the far copy grows, and that of the passage where it stood first."""
    model, _ = _loaded()
    written = texts(seed)
    scores = PositionalHeads().measure(model, [{"input_ids": row[None]} for row in written[:4]])
    part = written[:, 1 : 1 + PART]
    ids = torch.cat([written[:, : 1 + PART], written[:, -GAP:], part], 1)
    top = scores.top(HEADS)
    plain = losses(ids)

    def damage(heads: Any) -> tuple[float, float]:
        found = losses(ids, heads)
        return found[0] - plain[0], found[1] - plain[1]

    masked = damage(top)
    others = [damage(scores.others(top, seed=draw)) for draw in range(DRAWS)]
    return {
        "effect": masked[0],
        "control": sum(far for far, _ in others) / DRAWS,
        "first time, positional": masked[1],
        "first time, others": sum(near for _, near in others) / DRAWS,
        "plain": plain[0],
        "plain, first time": plain[1],
        "best score": scores.of(*top[0]),
        "median score": float(scores.values.median()),
    }


EXPERIMENT = Experiment(
    work="rope-positional-heads",
    claim=(
        "Masking the six heads of stories260K whose leading rotary dimension grows most with the "
        "distance raises the loss of a passage that stood 96 tokens before more than masking as "
        "many others."
    ),
    control="Six of the other heads masked in the same way, the mean over ten draws.",
    measure=measure,
)
