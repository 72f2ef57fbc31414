"""PASTA on a tiny decoder that prefers its memory: emphasis on the fact that answers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

import attnbias as ab
from experiments._toys import FACTS, Conflict, Prompts, conflict
from experiments.common import Experiment

PROMPTS = 200


@torch.no_grad()
def preference(
    toy: Conflict, prompts: Prompts, rule: ab.steer.Rule | None, places: Tensor | None = None
) -> float:
    """Mean log-odds (nats) of what the context says over what was learnt.

    Args:
        places: the position of the span "fact" of each row.
    """
    spans = {}
    if places is not None:
        spans = {"fact": [(at, at + 1) for at in places.tolist()]}
    with contextlib.nullcontext() if rule is None else ab.steer(toy.model, rule, spans=spans):
        logs = toy.model(prompts.tokens).logits[:, -1].log_softmax(-1)
    row = torch.arange(len(logs))
    return float((logs[row, prompts.told] - logs[row, prompts.learnt]).mean())


def facts(toy: Conflict, prompts: Prompts) -> tuple[Tensor, Tensor]:
    """Where the fact stands that answers, and where another one does."""
    start, stop = toy.spans["context"]
    place = (prompts.tokens[:, start:stop] == prompts.told[:, None]).int().argmax(1)
    return start + place, start + (place + 1) % FACTS


def measure(seed: int) -> Mapping[str, float]:
    """How much the emphasis moves the answer towards the context."""
    toy = conflict(seed)
    prompts = toy.prompts(PROMPTS, seed + 100)
    gold, other = facts(toy, prompts)
    rule = ab.rules.PASTA(keys="fact", heads="all", scope="all")
    plain = preference(toy, prompts, None)
    return {
        "effect": preference(toy, prompts, rule, gold) - plain,
        "control": preference(toy, prompts, rule, other) - plain,
        "plain": plain,
    }


EXPERIMENT = Experiment(
    work="pasta",
    claim=(
        "Emphasising the fact that answers the question, with the published factor 0.01 on "
        "everything else, raises the log-odds of the context's answer over the learnt one."
    ),
    control="The same emphasis on another fact of the same context.",
    measure=measure,
)
