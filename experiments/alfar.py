"""ALFAR on a decoder whose memory and context conflict, beside its edits of other columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

import attnbias as ab
from experiments._toys import Conflict, Prompts, conflict
from experiments.common import Experiment

ROWS = 300


def told(
    toy: Conflict, prompts: Prompts, rule: ab.Rule | None, spans: Mapping[str, object]
) -> float:
    """How often the answer is what the context says."""
    with torch.no_grad():
        if rule is None:
            logits = toy.model(prompts.tokens).logits
        else:
            with ab.steer(toy.model, rule, spans=spans):
                logits = toy.model(prompts.tokens).logits
    return float((logits[:, -1].argmax(-1) == prompts.told).float().mean())


def measure(seed: int) -> dict[str, float]:
    toy = conflict(seed)
    prompts = toy.prompts(ROWS, 1000 + seed)
    image, context = toy.spans["image"], toy.spans["context"]
    spans = {"image": image, "question": toy.spans["question"], "document 0": context}
    # As many columns, drawn from the whole prompt: the same two edits, and a branch that lacks as
    # many tokens.
    order = torch.randperm(
        prompts.tokens.shape[1] - 2, generator=torch.Generator().manual_seed(seed)
    )
    drawn = {f"column {n}": (int(place) + 1, int(place) + 2) for n, place in enumerate(order)}
    drawn["question"] = toy.spans["question"]
    names, sizes = tuple(drawn), (image[1] - image[0], context[1] - context[0])
    exchanged = {**spans, "image": context, "document 0": image}

    def run(rule: ab.Rule, where: Mapping[str, object]) -> float:
        return told(toy, prompts, rule, where)

    def drawn_for(rule: ab.rules.ALFAR) -> ab.rules.ALFAR:
        return replace(rule, image=names[: sizes[0]], context=names[sizes[0] : sum(sizes)])

    whole = ab.rules.ALFAR(heads="all")
    moved = ab.rules.ALFAR(heads="all", fusion=False)
    return {
        "effect": run(whole, spans),
        "control": run(drawn_for(whole), drawn),
        "exchanged": run(whole, exchanged),
        "plain": told(toy, prompts, None, spans),
        "reallocation alone": run(moved, spans),
        "reallocation alone, other columns": run(drawn_for(moved), drawn),
        "fusion alone": run(ab.rules.ALFAR(heads="all", strength=0.0), spans),
        "published form": run(ab.rules.ALFAR(heads="all", form="paper"), spans),
        "share form": run(ab.rules.ALFAR(heads="all", form="share"), spans),
    }


EXPERIMENT = Experiment(
    work="alfar",
    claim="Reallocation and fusion raise how often a decoder answers by its context where that "
    "conflicts with what it has learnt.",
    control="the same rule on as many columns drawn from the whole prompt, and a branch that lacks "
    "as many tokens",
    measure=measure,
)
