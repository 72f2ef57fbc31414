"""Contiguity comes with training and goes with the induction heads, not with as many others."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import attnbias as ab
from attnbias.measures import EpisodicMemory, Scores
from experiments._induction import decoder, train
from experiments.common import Experiment

HEADS, DRAWS, STEPS = 4, 6, 300  # of 16 heads; sets of others; steps of training
EARLIER = (0, 75, 150)


def recall(model: Any) -> Scores:
    return EpisodicMemory(length=24, lags=5, count=16).measure(model)


def ahead(scores: Scores) -> float:
    """The probability that the model gives to the token after the earlier copy (lag 1)."""
    return float(scores.details["said"][scores.details["lags"].index(1)])


def without(model: Any, heads: tuple[tuple[int, int], ...]) -> Scores:
    with ab.steer(model, ab.rules.BlockHeads(heads=heads)):
        return recall(model)


def measure(seed: int) -> Mapping[str, float]:
    """How much of the probability at lag 1 is lost without heads, of 1."""
    seen: dict[int, float] = {}
    model = decoder(seed, 4, 4)

    def look(step: int) -> None:
        if step in EARLIER:
            seen[step] = ahead(recall(model))

    train(model, seed, STEPS, look=look)
    whole = recall(model)
    top = whole.top(HEADS)
    others = [without(model, whole.others(top, draw)) for draw in range(DRAWS)]
    gone = without(model, top)
    best = whole.details["profile"].amax((0, 1))
    lags = whole.details["lags"]
    return {
        "effect": 1 - ahead(gone) / ahead(whole),
        "control": 1 - mean(ahead(other) for other in others) / ahead(whole),
        "said_at_1": ahead(whole),
        "said_at_minus_1": float(whole.details["said"][lags.index(-1)]),
        "said_without_induction_heads": ahead(gone),
        "said_without_others": mean(ahead(other) for other in others),
        **{f"said_after_{step}_steps": value for step, value in seen.items()},
        "attention_at_1": float(best[lags.index(1)]),
        "attention_at_minus_1": float(best[lags.index(-1)]),
        "contiguity": float(whole.details["contiguity"].max()),
    }


EXPERIMENT = Experiment(
    work="episodic-memory-attention",
    claim=(
        "A decoder of four layers trained here on lists that repeat says, for a token of a list "
        "read in another order, the one that came after it (lag 1); without the quarter of its "
        "heads that attend there most this is gone."
    ),
    control="As many other heads set to zero, the mean of six draws.",
    measure=measure,
    seeds=(0, 1, 2),
)
