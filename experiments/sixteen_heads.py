"""Importance of heads: pruning by it beside pruning at random, on a decoder trained on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from attnbias.measures import HeadAblation, HeadImportance, HeadPruning, Scores
from experiments._toys import Conflict, conflict
from experiments.common import Experiment

TRAIN, TEST, DRAWS = 64, 192, 4


def answered(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Probability of the right answer, of every row."""
    found: Tensor = outputs.logits[:, -1].softmax(-1).gather(1, inputs["labels"][:, -1:])[:, 0]
    return found


def loss(outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of the right answer, of every row."""
    logs = outputs.logits[:, -1].log_softmax(-1)
    found: Tensor = -logs.gather(1, inputs["labels"][:, -1:])[:, 0]
    return found


def batch(toy: Conflict, rows: int, seed: int) -> dict[str, Tensor]:
    """Prompts that ask of things that only the context tells."""
    prompts = toy.prompts(rows, seed, known=0.0)
    labels = torch.full_like(prompts.tokens, -100)
    labels[:, -1] = prompts.told
    return {"input_ids": prompts.tokens, "labels": labels}


def area(toy: Conflict, order: list[tuple[int, int]], data: dict[str, Tensor]) -> float:
    """Mean height of the pruning curve: probability of the right answer over heads taken out."""
    pruning = HeadPruning(order=tuple(order), step=1 / 8, score=answered)
    return pruning.measure(toy.model, [data]).area


def magnitude(toy: Conflict) -> Scores:
    """The size of each head's output weights: the baseline that looks at no data."""
    rows = []
    for layer in toy.model.model.layers:
        weight = layer.self_attn.o_proj.weight.detach().double()
        rows.append(weight.reshape(weight.shape[0], 4, -1).norm(dim=(0, 2)))
    return Scores("magnitude", "text", (0, 1), torch.stack(rows)[None])


def measure(seed: int) -> Mapping[str, float]:
    """Area under the pruning curve: least important first, beside orders at random."""
    toy = conflict(seed)
    train, test = batch(toy, TRAIN, 100 + seed), batch(toy, TEST, 200 + seed)
    importance = HeadImportance(loss=loss).measure(toy.model, [train])
    ablation = HeadAblation(loss=loss).measure(toy.model, [train])
    order = importance.ranked()[::-1]
    generator = torch.Generator().manual_seed(seed)
    random = []
    for _ in range(DRAWS):
        mixed = torch.randperm(len(order), generator=generator).tolist()
        random.append(area(toy, [order[n] for n in mixed], test))
    with torch.no_grad():
        plain = float(answered(toy.model(test["input_ids"]), test).mean())
    return {
        "effect": area(toy, order, test),
        "control": mean(random),
        "most important first": area(toy, order[::-1], test),
        "lowest magnitude first": area(toy, magnitude(toy).ranked()[::-1], test),
        "smallest ablation first": area(toy, ablation.ranked()[::-1], test),
        "no head out": plain,
    }


EXPERIMENT = Experiment(
    work="sixteen-heads",
    claim=(
        "Heads taken out in the order of their importance by the gradient, the least important "
        "first, cost least: the mean probability of the right answer over the shares of heads out. "
        "Tiny decoders that read a context; importance from other prompts."
    ),
    control="The same heads in random orders (mean of 4); beside it, by magnitude of the weights.",
    measure=measure,
)
