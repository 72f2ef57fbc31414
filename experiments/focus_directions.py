"""Focus directions learnt on some prompts of a tiny decoder, held against random ones on others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

import attnbias as ab
from experiments._toys import Conflict, conflict
from experiments.common import Experiment
from experiments.pasta import PROMPTS, facts, preference

EXAMPLES, TOP, EPOCHS, RATE, ALPHA = 100, 3, 10, 0.02, 0.2


def fitted(toy: Conflict, seed: int) -> ab.rules.FocusDirections:
    """Directions that raise the attention of the last token on the fact that answers."""
    prompts = toy.prompts(EXAMPLES, seed + 200)
    gold, _ = facts(toy, prompts)
    last = prompts.tokens.shape[1] - 1
    examples = [
        ab.rules.FocusExample(
            {"input_ids": ids[None]}, relevant=(at, at + 1), response=(last, last + 1)
        )
        for ids, at in zip(prompts.tokens, gold.tolist(), strict=True)
    ]
    return ab.rules.FocusDirections(heads="all", alpha=ALPHA).fit(
        toy.model, examples, top=TOP, epochs=EPOCHS, rate=RATE, seed=seed, progress=False
    )


def randomised(rule: ab.rules.FocusDirections, seed: int) -> ab.rules.FocusDirections:
    """Other directions of the same lengths in the same heads."""
    learnt = torch.tensor(rule.directions)
    drawn = torch.randn(learnt.shape, generator=torch.Generator().manual_seed(seed))
    drawn = drawn / drawn.norm(dim=1, keepdim=True) * learnt.norm(dim=1, keepdim=True)
    return replace(rule, directions=tuple(tuple(row) for row in drawn.tolist()), fitted=None)


def measure(seed: int) -> Mapping[str, float]:
    """How far the answers of prompts that the fit has not seen move towards the context."""
    toy = conflict(seed)
    prompts = toy.prompts(PROMPTS, seed + 100)
    rule = fitted(toy, seed)
    assert rule.fitted is not None
    plain = preference(toy, prompts, None)
    random = [
        preference(toy, prompts, randomised(rule, 10 * seed + draw)) - plain for draw in range(5)
    ]
    return {
        "effect": preference(toy, prompts, rule) - plain,
        "control": sum(random) / len(random),
        "turned_round": preference(toy, prompts, replace(rule, alpha=-ALPHA)) - plain,
        "share_before": rule.fitted.before,
        "share_after": rule.fitted.after,
    }


EXPERIMENT = Experiment(
    work="focus-directions",
    claim=(
        "Directions learnt for the three heads that look at the relevant fact raise the log-odds "
        "of the context's answer over the learnt one on prompts that the fit has not seen."
    ),
    control="Random directions of the same length in the same heads, the mean of five draws.",
    measure=measure,
)
