"""Retrieval heads of a decoder that finds facts in its context: masked, beside as many others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import attnbias as ab
from attnbias.measures import RetrievalHeads, Scores
from experiments._toys import FACTS, Conflict, Prompts, conflict
from experiments.common import Experiment

TRIALS, PROMPTS, HEADS, DRAWS = 60, 300, 3, 10


def needles(toy: Conflict, prompts: Prompts) -> list[dict[str, Any]]:
    """Each prompt with the place of the one fact that answers it."""
    start, stop = toy.spans["context"]
    here = prompts.tokens[:, start:stop] == prompts.told[:, None]
    places = start + here.long().argmax(-1)
    return [
        {"input_ids": row[None], "needle": (at, at + 1)}
        for row, at in zip(prompts.tokens, places.tolist(), strict=True)
    ]


def scored(toy: Conflict, seed: int) -> Scores:
    """The heads on needles that nothing but the context answers."""
    trials = needles(toy, toy.prompts(TRIALS, 100 + seed, known=0.0))
    return RetrievalHeads(steps=1).measure(toy.model, trials)


@torch.no_grad()
def right(toy: Conflict, prompts: Prompts, heads: Any = None, mode: Any = "uniform") -> float:
    """How often the model finds the needle, with some heads masked."""
    rule = ab.rules.BlockHeads(heads=heads or "all", mode=mode if heads else None)
    with ab.steer(toy.model, rule):
        said = toy.model(prompts.tokens).logits[:, -1].argmax(-1)
    return float((said == prompts.told).double().mean())


def measure(seed: int) -> Mapping[str, float]:
    """The share of needles that masking loses."""
    toy = conflict(seed)
    scores = scored(toy, seed)
    prompts = toy.prompts(PROMPTS, 200 + seed, known=0.0)
    top = scores.top(HEADS)
    drawn = [scores.others(top, seed=draw) for draw in range(DRAWS)]
    others = [right(toy, prompts, heads) for heads in drawn]
    silent = [right(toy, prompts, heads, "zero") for heads in drawn]
    plain = right(toy, prompts)
    return {
        "effect": plain - right(toy, prompts, top),
        "control": plain - sum(others) / DRAWS,
        "worst of the others": plain - min(others),
        "plain": plain,
        "chance": 1 / FACTS,
        "trials that count": float(sum(scores.details["kept"])),
        "best score": scores.of(*top[0]),
        "heads above 0.1": float(len(scores.above(0.1))),
        "heads": float(len(scores.heads)),
        "silenced": plain - right(toy, prompts, top, "zero"),
        "others silenced": plain - sum(silent) / DRAWS,
    }


EXPERIMENT = Experiment(
    work="retrieval-heads",
    claim=(
        "Masking the three heads that score highest as retrieval heads (they attend to all keys "
        "alike) lowers how often a decoder trained here finds the needle, the one fact of four in "
        "its context that answers, in prompts that the scores have not seen."
    ),
    control="Three of the other five heads masked in the same way, the mean over ten draws.",
    measure=measure,
    seeds=(0, 1, 2),
)
