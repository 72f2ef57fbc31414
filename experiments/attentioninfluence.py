"""Texts scored by what they lose without a retrieval head: lists with and without a repeat."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnbias.measures import AttentionInfluence, RetrievalHeads, Scores
from experiments._induction import LENGTH, VOCABULARY, decoder, repeated, train
from experiments.common import Experiment
from experiments.lookback_lens import auroc

TRIALS, TEXTS, HEADS, DRAWS = 40, 100, 3, 10
LIST, CUE, NEEDLE = 20, 4, 6


@lru_cache(maxsize=8)
@torch.enable_grad()
def copier(seed: int) -> Any:
    """Two layers of four heads that go on with lists that repeat."""
    return train(decoder(seed, 2, 4), seed)


def trials(seed: int) -> list[dict[str, Any]]:
    """A list, then its first tokens again: the needle is what comes next."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(TRIALS):
        words = 1 + torch.randperm(VOCABULARY - 1, generator=generator)[:LIST]
        depth = int(torch.randint(LIST - CUE - NEEDLE + 1, (), generator=generator))
        start = 1 + depth + CUE
        prompt = torch.cat([words.new_zeros(1), words, words[depth : depth + CUE]])
        found.append({"input_ids": prompt[None], "needle": (start, start + NEEDLE)})
    return found


def documents(seed: int) -> tuple[Tensor, Tensor]:
    """Lists that begin again, and lists of as many tokens without any repeat."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.rand(TEXTS, VOCABULARY - 1, generator=generator).argsort(-1) + 1
    plain = torch.cat([words.new_zeros(TEXTS, 1), words], 1)
    return repeated(TEXTS, generator)[:, :LENGTH], plain[:, :LENGTH]


def scored(model: Any, seed: int) -> Scores:
    return RetrievalHeads(steps=NEEDLE, least=None).measure(model, trials(100 + seed))


def measure(seed: int) -> Mapping[str, float]:
    """The probability that a text which repeats itself scores above one that does not."""
    model = copier(seed)
    scores = scored(model, seed)
    copied, plain = documents(200 + seed)
    labels = torch.arange(2 * TEXTS) < TEXTS

    def run(heads: Any) -> tuple[float, float]:
        data = [{"input_ids": copied}, {"input_ids": plain}]
        found = AttentionInfluence(heads).measure(model, data).values
        return auroc(found, labels), float(found[:TEXTS].mean() - found[TEXTS:].mean())

    top = scores.top(HEADS)
    best = run(top)
    drawn = [run(scores.others(top, seed=draw)) for draw in range(DRAWS)]
    others = [sum(part) / DRAWS for part in zip(*drawn, strict=True)]
    return {
        "effect": best[0],
        "control": others[0],
        "score apart": best[1],
        "score apart, others": others[1],
        "heads above 0.1": float(len(scores.above(0.1))),
        "best score": scores.of(*top[0]),
        "lowest score": float(scores.values.min()),
    }


EXPERIMENT = Experiment(
    work="attentioninfluence",
    claim=(
        "The relative growth of a small decoder's loss without its three best retrieval heads "
        "tells lists that repeat from lists that do not (AUROC)."
    ),
    control="The same score with three of the other five heads masked, the mean over ten draws.",
    measure=measure,
    seeds=(0, 1, 2),
)
