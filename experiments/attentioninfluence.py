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

TRIALS, TEXTS, HEADS, DRAWS = 40, 100, 1, 7
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
    """The mean score of texts to be copied less that of texts with nothing to copy."""
    model = copier(seed)
    scores = scored(model, seed)
    copied, plain = documents(200 + seed)
    labels = torch.arange(2 * TEXTS) < TEXTS

    def run(heads: Any) -> tuple[float, float, float]:
        data = [{"input_ids": copied}, {"input_ids": plain}]
        found = AttentionInfluence(heads).measure(model, data).values
        return float(found[:TEXTS].mean()), float(found[TEXTS:].mean()), auroc(found, labels)

    top = scores.top(HEADS)
    best = run(top)
    drawn = [run((head,)) for head in scores.heads if head not in top]
    others = [sum(part) / len(drawn) for part in zip(*drawn, strict=True)]
    return {
        "effect": best[0] - best[1],
        "control": others[0] - others[1],
        "auroc": best[2],
        "auroc, others": others[2],
        "most of the others": max(part[0] - part[1] for part in drawn),
        "best score": scores.of(*top[0]),
        "median score": float(scores.values.median()),
    }


EXPERIMENT = Experiment(
    work="attentioninfluence",
    claim=(
        "Masking the head of a small decoder that scores highest as a retrieval head raises the "
        "loss of texts that repeat themselves, relative to that of texts that do not, more than "
        "masking any other head does on average."
    ),
    control="Each of the other seven heads masked in the same way, the mean over them.",
    measure=measure,
)
