"""Induction heads appear in two layers and not in one, unless keys are smeared; ablations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import attnbias as ab
from attnbias.measures import InContextScore, InductionHeads
from experiments._induction import decoder, repeated, train
from experiments.common import Experiment

EARLY, LATE = 6, 40  # the first token of the first list that none repeats; late in every text


def looked_at(model: Any) -> ab.measures.Scores:
    return InductionHeads(length=16, repeats=2, count=16).measure(model)


def best(scores: ab.measures.Scores) -> float:
    return scores.of(*scores.top(1)[0])


def in_context(model: Any, heads: tuple[tuple[int, int], ...] = ()) -> float:
    ids = repeated(64, torch.Generator().manual_seed(7))
    measure = InContextScore(early=EARLY, late=LATE, heads=heads)
    return measure.measure(model, [{"input_ids": ids}]).score


def measure(seed: int) -> Mapping[str, float]:
    """The best prefix matching of any head, and what is left of the score without such heads."""
    two = train(decoder(seed, 2, 4), seed)
    one = train(decoder(seed, 1, 8), seed)
    smeared = train(decoder(seed, 1, 8, smeared=True), seed)
    scores = looked_at(two)
    found = scores.above(0.3)[:4]
    plain = in_context(two)
    return {
        "effect": best(scores),
        "control": best(looked_at(one)),
        "smeared_keys_one_layer": best(looked_at(smeared)),
        "lists_without_repeat": float(scores.control.mean(0).max()),  # type: ignore[union-attr]
        "in_context_two": plain,
        "in_context_one": in_context(one),
        "in_context_smeared": in_context(smeared),
        "induction_heads": float(len(found)),
        "without_induction_heads": in_context(two, found) if found else plain,
        "without_as_many_others": in_context(two, scores.others(found, seed)) if found else plain,
    }


EXPERIMENT = Experiment(
    work="induction-heads",
    claim=(
        "Decoders of attention alone trained here on random lists that begin again: the best head "
        "of two layers of four heads matches prefixes, that of one layer of eight does not."
    ),
    control="One layer with as many heads, as many weights in them and the same training.",
    measure=measure,
    seeds=(0, 1, 2),
)
