"""The largest activations of a real small decoder set to zero, to their mean, and others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures.massive_activations import Massive, is_massive
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import Heads, Rule
from experiments.common import Experiment
from experiments.streaming_llm import texts
from experiments.zerotuning import _loaded

RATIO = 8.0  # times the median; of the largest entries of this model the published 1000 finds none
LAYER, LENGTH, TRAIN = 1, 96, 12


@dataclass(frozen=True, kw_only=True)
class Elsewhere(Rule):
    """Where an entry is massive, the entry of another dimension of the same token is set to 0."""

    heads: Heads = "all"
    other: tuple[tuple[int, int], ...]

    hidden_at: ClassVar[tuple[str, ...]] = ("layer",)

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        median = hidden.double().abs().flatten(1).median(1).values
        massive = is_massive(hidden.double(), median[:, None, None], 0.0, RATIO)
        new = hidden.clone()
        for dimension, another in self.other:
            new[..., another] = torch.where(massive[..., dimension], 0.0, new[..., another])
        return new


@torch.no_grad()
def loss(rows: Tensor, *rules: Rule) -> float:
    """Mean cross-entropy (nats) of the next token under rules."""
    model: Any = _loaded()[0]
    with ab.steer(model, *rules) if rules else torch.no_grad():
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))


def found(rows: Tensor) -> Massive:
    """The largest activations, by the lowered thresholds."""
    finder = ab.measures.MassiveActivations(size=0.0, ratio=RATIO)
    massive: Massive = finder.measure(_loaded()[0], [{"input_ids": rows}])
    return massive


def measure(seed: int) -> Mapping[str, float]:
    """Rises of the loss (nats per token) on texts that were not used to find the activations."""
    rows = texts(seed)[:, :LENGTH]
    train, test = rows[:TRAIN], rows[TRAIN:]
    massive = found(train)
    here = list(massive.means(LAYER))
    size = int(_loaded()[0].config.hidden_size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    others = [dimension for dimension in order if dimension not in here][: len(here)]
    swap = Elsewhere(layers=(LAYER,), other=tuple(zip(here, others, strict=True)))
    plain = loss(test)
    published = ab.measures.MassiveActivations().measure(_loaded()[0], [{"input_ids": train}])
    return {
        "effect": loss(test, massive.replacing("zero", LAYER)) - plain,
        "control": loss(test, swap) - plain,
        "to_the_mean": loss(test, massive.replacing("mean", LAYER)) - plain,
        "plain": plain,
        "dimensions": float(len(here)),
        "share_of_entries": sum(one.layer == LAYER for one in massive.found)
        / (TRAIN * LENGTH * size),
        "largest_over_median": float(massive.ratios.mean()),
        "found_by_published_thresholds": float(len(published.found)),
    }


EXPERIMENT = Experiment(
    work="massive-activations",
    claim=(
        "Setting the largest activations after the second layer of stories260K (at least 8 times "
        "the median; it has none of the published 1000 times) to zero raises the loss on other "
        "texts (nats per token)."
    ),
    control="As many entries of the same tokens in other dimensions set to zero.",
    measure=measure,
)
