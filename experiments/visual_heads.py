"""Visual heads of a decoder that looks patches up: needed, unlike as many others of their layer."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures import Scores
from experiments._tiny import decoder, schooling
from experiments.common import Experiment

SHAPES, COLOURS, WORDS = 8, 6, 6
BOS, ASK, WORD = 0, 1, 2
PATCH = WORD + WORDS
SHAPE = PATCH + SHAPES * COLOURS
VOCABULARY = SHAPE + SHAPES
SIZES, MASKED, ROWS = (4, 5, 6, 7, 8), 2, 400


def prompts(rows: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``BOS | image | four words | ASK | a shape``, and the colour of the patch of that shape.

    A patch is one token for its shape and colour; the shapes of an image differ.
    """
    shapes = torch.rand(rows, SHAPES, generator=generator).argsort(-1)[:, :size]
    colours = torch.randint(COLOURS, (rows, size), generator=generator)
    words = WORD + torch.randint(WORDS, (rows, 4), generator=generator)
    asked = torch.randint(size, (rows, 1), generator=generator)
    one = torch.ones(rows, 1, dtype=torch.long)
    image = PATCH + shapes * COLOURS + colours
    tokens = torch.cat([BOS * one, image, words, ASK * one, SHAPE + shapes.gather(1, asked)], 1)
    return tokens, colours.gather(1, asked)[:, 0]


@lru_cache(maxsize=8)
@torch.enable_grad()
def model_of(seed: int, steps: int = 400) -> Any:
    """Train the decoder on images of four to eight patches."""
    model = decoder(seed, VOCABULARY)
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(model, steps)
    for step in range(steps):
        tokens, colour = prompts(96, SIZES[step % len(SIZES)], generator)
        logits = model(tokens, logits_to_keep=1).logits[:, -1, :COLOURS]
        loss = torch.nn.functional.cross_entropy(logits, colour)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


def accuracy(model: Any, heads: tuple[tuple[int, int], ...], seed: int) -> float:
    """How often the colour is right, with some heads looking at everything alike."""
    tokens, colour = prompts(ROWS, 6, torch.Generator().manual_seed(1000 + seed))
    rule = ab.rules.BlockHeads(heads=heads, mode="uniform") if heads else None
    with torch.no_grad(), nullcontext() if rule is None else ab.steer(model, rule):
        logits = model(tokens).logits[:, -1, :COLOURS]
    return float((logits.argmax(-1) == colour).double().mean())


def scored(model: Any, size: int, seed: int) -> Scores:
    tokens, _ = prompts(64, size, torch.Generator().manual_seed(2000 + seed))
    data: list[Mapping[str, Any]] = [{"input_ids": tokens, "spans": {"image": (1, 1 + size)}}]
    return ab.measures.VisualHeads().measure(model, data)


def measure(seed: int, steps: int = 400) -> dict[str, float]:
    model = model_of(seed, steps)
    scores = scored(model, 6, seed)
    top = scores.top(MASKED)
    whole = accuracy(model, (), seed)
    lost = [whole - accuracy(model, others(scores, top, draw), seed) for draw in range(3)]
    small, large = (scored(model, size, seed).values.flatten() for size in (4, 8))
    return {
        "effect": whole - accuracy(model, top, seed),
        "control": sum(lost) / len(lost),
        "plain accuracy": whole,
        "rank correlation of 4 and 8 patches": _ranked(small, large),
    }


def others(
    scores: Scores, heads: tuple[tuple[int, int], ...], draw: int
) -> tuple[tuple[int, int], ...]:
    """As many heads of the same layers as the heads chosen."""
    generator = torch.Generator().manual_seed(draw)
    found: list[tuple[int, int]] = []
    for layer in sorted({one for one, _ in heads}):
        mine = [head for head in heads if head[0] == layer]
        rest = [head for head in scores.heads if head[0] == layer and head not in mine]
        order = torch.randperm(len(rest), generator=generator)[: len(mine)]
        found += [rest[n] for n in order.tolist()]
    return tuple(found)


def _ranked(one: Tensor, other: Tensor) -> float:
    places = torch.stack([one.argsort().argsort(), other.argsort().argsort()]).double()
    return float(torch.corrcoef(places)[0, 1])


EXPERIMENT = Experiment(
    work="visual-heads",
    claim="The two heads with the highest visual score of a decoder that was taught to look a "
    "patch up are needed: with uniform attention in them, fewer answers are right.",
    control="two other heads of the same layers, the mean of three draws",
    measure=measure,
)
