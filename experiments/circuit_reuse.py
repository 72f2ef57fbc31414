"""A hard pattern for the last query: the answer follows the token that heads are made to read."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

import attnbias as ab
from experiments._toys import Conflict, conflict
from experiments.common import Experiment
from experiments.pasta import PROMPTS, facts, preference

HEADS = 2  # of the four heads of a layer


def measure(seed: int) -> Mapping[str, float]:
    """How far the answer moves when the reading heads of the last layer look at its fact alone."""
    toy = conflict(seed)
    prompts = toy.prompts(PROMPTS, seed + 100)
    gold, other = facts(toy, prompts)
    plain = preference(toy, prompts, None)
    heads = _readers(toy, seed)

    def gain(places: Tensor, chosen: list[int]) -> float:
        rule = ab.rules.HardPattern(keys="fact", heads={1: chosen})
        return preference(toy, prompts, rule, places) - plain

    rest = [head for head in range(4) if head not in heads]
    return {
        "effect": gain(gold, heads),
        "control": gain(other, heads),
        "other_heads": gain(gold, rest),
        "plain": plain,
    }


def _readers(toy: Conflict, seed: int) -> list[int]:
    """The heads of the last layer that move the answer most, found on other prompts."""
    prompts = toy.prompts(PROMPTS, seed + 200)
    gold, _ = facts(toy, prompts)
    scores = [
        preference(
            toy,
            prompts,
            ab.rules.HardPattern(keys="fact", heads={1: [head]}),
            gold,
        )
        for head in range(4)
    ]
    return sorted(range(4), key=lambda head: -scores[head])[:HEADS]


EXPERIMENT = Experiment(
    work="circuit-reuse",
    claim=(
        "Replacing the last query's row by a hard pattern on the token that holds the answer, in "
        "the two heads found on other prompts, raises the log-odds of that answer."
    ),
    control="The same pattern in the same heads on another fact of the context.",
    measure=measure,
)
