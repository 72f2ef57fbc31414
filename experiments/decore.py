"""DeCoRe on a decoder whose memory and context conflict: retrieval heads beside as many others."""

from __future__ import annotations

from dataclasses import replace

import torch

import attnbias as ab
from experiments._toys import conflict
from experiments.alfar import ROWS, told
from experiments.common import Experiment

NEEDLES, HEADS = 60, 3


def measure(seed: int) -> dict[str, float]:
    toy = conflict(seed)
    prompts = toy.prompts(ROWS, 1000 + seed)
    known = toy.prompts(NEEDLES, 2000 + seed, known=0.0)  # of these the context alone says anything
    span = toy.spans["context"]
    needles = [
        ab.rules.Needle({"input_ids": row[None]}, span, (int(answer),))
        for row, answer in zip(known.tokens, known.told, strict=True)
    ]
    rule = ab.rules.DeCoRe(heads="all").fit(toy.model, needles, count=HEADS, progress=False)
    config = toy.model.config
    every = [
        (layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    ]
    rest = [head for head in every if head not in rule.heads]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:HEADS]
    random = replace(rule, heads=tuple(rest[number] for number in order.tolist()), scores=())

    def run(chosen: ab.Rule) -> float:
        return told(toy, prompts, chosen, {})

    return {
        "effect": run(rule),
        "control": run(random),
        "plain": told(toy, prompts, None, {}),
        "static": run(replace(rule, strength=0.5)),
        "static, other heads": run(replace(random, strength=0.5)),
        "zeroed": run(replace(rule, mode="zero")),
        "zeroed, other heads": run(replace(random, mode="zero")),
    }


EXPERIMENT = Experiment(
    work="decore",
    claim="Contrasting with the heads that a needle test finds raises how often a decoder answers "
    "by its context where that conflicts with what it has learnt.",
    control="as many heads, drawn from all others, blocked in the same way",
    measure=measure,
)
