"""A tiny decoder that either repeats its context or talks from memory, and who says which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments._tiny import decoder, schooling

BOS, SO = 0, 1
FIRST, SYMBOLS = 2, 30  # tokens of the text
OWN = 8  # the symbols that the decoder knows by heart: FIRST to FIRST + OWN
CONTEXT = 6
START = 2 + CONTEXT  # of the response, behind BOS | context | SO
VOCABULARY = FIRST + SYMBOLS
STAY = 0.9  # probability that the next token is of the same kind as this one


@dataclass(frozen=True)
class Copying:
    """``BOS | six symbols | SO | response``: each token of a response repeats one of the context
    (faithful), or is one of eight symbols known by heart (unfaithful); kinds go on for a while.
    """

    model: Any
    spans: dict[str, tuple[int, int]]

    def prompts(self, rows: int, seed: int) -> Tensor:
        """Prompts ``(rows, START)``, without any symbol that is known by heart."""
        return _prompts(rows, torch.Generator().manual_seed(seed))

    def faithful(self, ids: Tensor) -> Tensor:
        """Whether each token of a response ``(rows, length)`` is in its context."""
        context, response = ids[:, 1 : 1 + CONTEXT], ids[:, START:]
        return (response[..., None] == context[:, None]).any(-1)


def _prompts(rows: int, generator: torch.Generator) -> Tensor:
    order = torch.rand(rows, SYMBOLS - OWN, generator=generator).argsort(-1)[:, :CONTEXT]
    one = torch.ones(rows, 1, dtype=torch.long)
    return torch.cat([BOS * one, FIRST + OWN + order, SO * one], 1)


def texts(rows: int, length: int, generator: torch.Generator) -> Tensor:
    """Prompts with responses as the decoder is taught them."""
    prompt = _prompts(rows, generator)
    switch = torch.rand(rows, length, generator=generator) > STAY
    copy = ((torch.rand(rows, 1, generator=generator) < 0.5).long() + switch.cumsum(-1)) % 2 == 1
    place = torch.randint(1, 1 + CONTEXT, (rows, length), generator=generator)
    own = FIRST + torch.randint(OWN, (rows, length), generator=generator)
    return torch.cat([prompt, torch.where(copy, prompt.gather(1, place), own)], 1)


@lru_cache(maxsize=8)
def copying(seed: int, steps: int = 300) -> Copying:
    """Train such a decoder: a few seconds on one thread."""
    model = decoder(seed, VOCABULARY, key_heads=2, length=128)
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(model, steps)
    for _ in range(steps):
        ids = texts(48, 24, generator)
        logits = model(ids).logits[:, START - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, START:].flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return Copying(model.eval(), {"context": (1, 1 + CONTEXT)})
