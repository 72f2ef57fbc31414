"""A tiny decoder that answers from one of several documents, and was taught to look at the ends."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnbias.hub.prompt import Prompt
from experiments._tiny import decoder, schooling

BOS, ASK, DUMMY = 0, 1, 2
NOISE, FACT, VALUES = 3, 15, 16  # a fact is a value, marked as good or not
VOCABULARY = FACT + 2 * VALUES
SLOTS, WORDS = 6, 3
ENDS = 0.47  # how often the right document was the first, and how often the last


@dataclass(frozen=True)
class Case:
    """Rows of tokens, the value to answer with, and the slot where it stands."""

    tokens: Tensor
    answer: Tensor
    slot: Tensor


def cases(rows: int, generator: torch.Generator, slot: Tensor | None = None) -> Case:
    """``BOS | six documents, each a fact and two words | ASK``.

    The right document is marked as good with probability 0.85, another one with 0.05. Without
    `slot` it stands where it stood in training; with it, there, and it alone is marked.
    """
    values = torch.rand(rows, VALUES, generator=generator).argsort(-1)[:, :SLOTS]
    good = torch.rand(rows, SLOTS, generator=generator) < 0.05
    row = torch.arange(rows)
    if slot is None:
        middle = (1 - 2 * ENDS) / (SLOTS - 2)
        odds = torch.tensor([ENDS, *[middle] * (SLOTS - 2), ENDS])
        slot = torch.multinomial(odds.expand(rows, -1), 1, generator=generator)[:, 0]
        good[row, slot] = torch.rand(rows, generator=generator) < 0.85
    else:
        good[:] = False
        good[row, slot] = True
    words = torch.randint(NOISE, FACT, (rows, SLOTS, WORDS), generator=generator)
    words[:, :, 0] = FACT + 2 * values + good
    one = torch.ones(rows, 1, dtype=torch.long)
    tokens = torch.cat([BOS * one, words.flatten(1), ASK * one], 1)
    return Case(tokens, values[row, slot], slot)


@lru_cache(maxsize=8)
def slots(seed: int, steps: int = 320) -> Any:
    """Train the decoder: some seconds on one thread."""
    model = decoder(seed, VOCABULARY)
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(model, steps)
    for _ in range(steps):
        batch = cases(96, generator)
        tokens = batch.tokens.clone()
        some = torch.rand(tokens.shape, generator=generator) < 0.02  # the dummy is known too
        tokens[:, 1:-1][some[:, 1:-1]] = DUMMY
        logits = model(tokens, logits_to_keep=1).logits[:, -1, FACT::2]
        loss = torch.nn.functional.cross_entropy(logits, batch.answer)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


def prompt(tokens: Tensor) -> Prompt:
    """One row with its documents named."""
    spans = {f"document {k}": (1 + WORDS * k, 1 + WORDS * (k + 1)) for k in range(SLOTS)}
    return Prompt({"input_ids": tokens[None]}, spans, [], "")
