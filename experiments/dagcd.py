"""DAGCD on a decoder whose memory and context conflict: used tokens beside drawn ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Rule, SiteCall, Step
from attnbias.steer.rule import Heads
from experiments._toys import conflict
from experiments.alfar import ROWS, told
from experiments.common import Experiment

EXAMPLES, HEADS = 150, 3


@dataclass(frozen=True, kw_only=True)
class Drawn(Rule):
    """What a DAGCD rule adds goes to one token of the context, drawn at random."""

    heads: Heads = "all"
    rule: Any
    seed: int

    def look(self, site: SiteCall) -> Tensor | None:
        return None

    def logits(self, step: Step) -> Tensor | None:
        plain = step.logits.softmax(-1)
        entropy = torch.special.entr(plain).sum(-1) / math.log(plain.shape[-1])
        inside = step.where(self.rule.context)
        generator = torch.Generator().manual_seed(self.seed)
        place = torch.rand(inside.shape, generator=generator).masked_fill(~inside, -1).argmax(-1)
        assert step.tokens is not None
        token = step.tokens.gather(1, place[:, None])
        added = self.rule.strength * entropy[:, None]
        new: Tensor = plain.scatter_add(1, token, added) / (1 + added)
        return new.log()


def measure(seed: int) -> Mapping[str, float]:
    toy = conflict(seed)
    prompts = toy.prompts(ROWS, 1000 + seed)
    known = toy.prompts(EXAMPLES, 2000 + seed, known=0.0)  # the model answers these by the context
    span = toy.spans["context"]
    examples = [
        ab.rules.ContextExample({"input_ids": row[None]}, span, (int(answer),))
        for row, answer in zip(known.tokens, known.told, strict=True)
    ]
    spans = {"document 0": span}
    plain = ab.rules.DAGCD(heads="all")
    rule = plain.fit(toy.model, examples, count=HEADS, progress=False)
    config = toy.model.config
    rest = [
        (layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
        if (layer, head) not in rule.heads
    ]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:HEADS]
    others = replace(plain, heads=tuple(sorted(rest[number] for number in order.tolist())))
    others = others.fit(toy.model, examples, count=HEADS, progress=False)
    return {
        "effect": told(toy, prompts, rule, spans),
        "control": told(toy, prompts, Drawn(rule=rule, seed=seed), spans),
        "plain": told(toy, prompts, None, spans),
        "other heads": told(toy, prompts, others, spans),
    }


EXPERIMENT = Experiment(
    work="dagcd",
    claim="Probability for the context tokens that the model is found to use raises how often a "
    "decoder answers by its context where that conflicts with what it has learnt.",
    control="at least as much probability, by the same rule of the entropy, for one token of the "
    "context drawn at random",
    measure=measure,
)
