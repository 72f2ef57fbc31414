"""VTI's directions on a real decoder: fitted on some pairs of texts, held against others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import attnbias as ab
from experiments.common import Experiment

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
GIRLS = (
    "Lily",
    "Sue",
    "Mia",
    "Anna",
    "Lucy",
    "Amy",
    "Sara",
    "Jane",
    "Emma",
    "Lisa",
    "Kim",
    "Daisy",
)
BOYS = ("Tim", "Max", "Ben", "Tom", "Sam", "Jack", "Bob", "Fred", "John", "Timmy", "Leo", "Mark")
OPENINGS = (
    "Once upon a time, there was a little {}.",
    "One day, a {} went to the park.",
    "There was a happy {} who liked to play.",
    "Once there was a {}.",
    "A {} lived in a big house.",
    "One day there was a sad {}.",
)
TRAIN, RANDOM = 24, 4


@functools.cache
def _loaded() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DATA / "stories260K-hf"
    return (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )


def _texts(seed: int) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """Pairs about a girl and a boy, and held-out prompts about boys of other names."""
    _, tokenizer = _loaded()
    generator = torch.Generator().manual_seed(seed)

    def shuffled(items: tuple[str, ...]) -> list[str]:
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    girls, boys, openings = shuffled(GIRLS), shuffled(BOYS), shuffled(OPENINGS)

    def inputs(opening: str, who: str) -> Any:
        return dict(tokenizer(opening.format(who), return_tensors="pt"))

    pairs = [
        (
            inputs(openings[n % 4], f"girl named {girls[n // 4]}"),
            inputs(openings[n % 4], f"boy named {boys[n // 4]}"),
        )
        for n in range(TRAIN)
    ]
    held = [inputs(opening, f"boy named {boy}") for opening in openings[4:] for boy in boys[6:]]
    return pairs, held


@torch.no_grad()
def odds(prompts: list[Any], rule: ab.steer.Rule | None) -> float:
    """The mean log-odds (nats) of "She" over "He" as the next word."""
    model, tokenizer = _loaded()
    she, he = tokenizer.convert_tokens_to_ids(["▁She", "▁He"])
    total = 0.0
    with contextlib.nullcontext() if rule is None else ab.steer(model, rule):
        for prompt in prompts:
            logits = model(**prompt).logits[0, -1]
            total += float(logits[she] - logits[he])
    return total / len(prompts)


def measure(seed: int) -> Mapping[str, float]:
    """The shift of the next word on held-out prompts, and that of random directions."""
    model, _ = _loaded()
    pairs, held = _texts(seed)
    rule = ab.rules.VTI().fit(model, pairs, progress=False)
    plain = odds(held, None)
    generator = torch.Generator().manual_seed(seed)
    shifts = []
    for _ in range(RANDOM):
        drawn = {
            one.layer: torch.randn(1, 64, generator=generator) for one in rule.directions or ()
        }
        shifts.append(abs(odds(held, ab.rules.VTI(directions=drawn)) - plain))
    back = ab.rules.VTI(directions=rule.directions, strength=-rule.strength)
    doubled = ab.rules.VTI(directions=rule.directions, strength=2 * rule.strength)
    return {
        "effect": odds(held, rule) - plain,
        "control": sum(shifts) / RANDOM,
        "plain": plain,
        "shift_reversed": odds(held, back) - plain,
        "shift_doubled": odds(held, doubled) - plain,
    }


EXPERIMENT = Experiment(
    work="vti-latent-steering",
    claim="Directions fitted on pairs of texts that differ in one respect (a girl or a boy) shift "
    "the next word of held-out prompts to that side (log-odds of She over He, nats), at the "
    "published strength 0.9 and with the lengths of all MLP outputs kept.",
    control="Random directions at the same strength: the size of their shift, mean of four draws.",
    measure=measure,
)
