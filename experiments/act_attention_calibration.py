"""ACT on a decoder with planted sinks: heads selected on some prompts, held against other heads."""

from __future__ import annotations

from collections.abc import Mapping

import torch

import attnbias as ab
from experiments._sinks import HEADS, LAYERS, planted, prompts, scores
from experiments.common import Experiment

EXAMPLES, TEST, SCORE, OTHERS, ALPHA, DRAWS = 24, 512, 2.0, 2, 2.0, 4


def measure(seed: int) -> Mapping[str, float]:
    """Gain in held-out log-probability of the answers (nats): selected heads, then any."""
    toy = planted(seed, OTHERS, SCORE)
    tokens, answer = prompts(EXAMPLES, 77 + seed)
    examples = [
        ab.rules.Example({"input_ids": tokens[n : n + 1]}, int(answer[n])) for n in range(EXAMPLES)
    ]
    # The relative threshold: a tenth is more than the mean share among thirteen tokens.
    rule = ab.rules.ACT(heads="all", layers=tuple(range(LAYERS)), alpha=ALPHA)
    rule = rule.fit(toy.model, examples, by="log_probability", progress=False)
    assert rule.heads != "all"
    selected = set(rule.heads)
    before = scores(toy.model, TEST, 900 + seed)
    with ab.steer(toy.model, rule):
        after = scores(toy.model, TEST, 900 + seed)
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    generator = torch.Generator().manual_seed(seed)
    others = []
    for _ in range(DRAWS):
        order = torch.randperm(len(every), generator=generator)[: len(selected)].tolist()
        with ab.steer(toy.model, ab.rules.ACT(heads=tuple(every[n] for n in order), alpha=ALPHA)):
            others.append(scores(toy.model, TEST, 900 + seed))
    control = [sum(part) / DRAWS for part in zip(*others, strict=True)]
    return {
        "effect": after[1] - before[1],
        "control": control[1] - before[1],
        "accuracy": after[0] - before[0],
        "control_accuracy": control[0] - before[0],
        "selected": len(selected),
        "planted_among_selected": len(selected & set(toy.heads)) / len(selected),
    }


EXPERIMENT = Experiment(
    work="act-attention-calibration",
    claim=(
        "Calibrating the sinks of the heads that `fit` selects on 24 prompts raises the held-out "
        "log-probability of the answers, in a decoder with harmful sinks planted in some heads."
    ),
    control="The same calibration of as many heads drawn at random, the mean of four draws.",
    measure=measure,
)
