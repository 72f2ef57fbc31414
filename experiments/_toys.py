"""Tiny decoders trained on the spot, whose answers are known: those of the text, those learnt."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from experiments._tiny import decoder, schooling

ENTITIES, VALUES, NOISE = 8, 6, 6
KNOWN = 4  # entities 0 to 3 have a learnt value, the others are only ever told
IMAGE, FACTS = 4, 4
BOS, ASK, SO = 0, 1, 2
ENTITY, NOTHING, FACT = 3, 3 + ENTITIES, 3 + ENTITIES + NOISE
VOCABULARY = FACT + ENTITIES * VALUES


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts with both answers; tokens ``(batch, length)``, the last one asks."""

    tokens: Tensor
    told: Tensor  # the token that the context gives
    learnt: Tensor  # the token that training gave


@dataclass(frozen=True)
class Conflict:
    """A decoder that reads an "image", a question and a context of facts, and answers.

    ``BOS | four image tokens, one of them an entity | ASK | four facts | SO``, a fact being one
    token for an entity and its value; the answer is the fact of the image's entity. Half of the
    entities have a learnt value: where the context says another, training answered by the context
    with probability `trust`, else by what was learnt. A model that does as it was taught answers
    from memory, though it reads the context well (of the other entities it knows nothing else). It
    has also seen known entities without any context, and answered by what was learnt.
    """

    model: Any
    prior: Tensor
    spans: dict[str, tuple[int, int]]

    def prompts(self, rows: int, seed: int, known: float = 1.0) -> Prompts:
        """Prompts that ask of known entities (a share of them), whose values the context changes.

        Of the other entities the context alone says anything, and the model answers by it.
        """
        return _prompts(self.prior, rows, torch.Generator().manual_seed(seed), known)


def _prompts(prior: Tensor, rows: int, generator: torch.Generator, known: float) -> Prompts:
    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    row = torch.arange(rows)
    some = torch.rand(rows, ENTITIES, generator=generator).argsort(-1)[:, :FACTS]
    asked_known = torch.rand(rows, generator=generator) < known
    asked = torch.where(asked_known, draw(KNOWN, rows), KNOWN + draw(ENTITIES - KNOWN, rows))
    place = draw(FACTS, rows)
    some = torch.where(some == asked[:, None], some[row, place][:, None], some)
    some[row, place] = asked
    values = (prior[some] + 1 + draw(VALUES - 1, rows, FACTS)) % VALUES
    image = NOTHING + draw(NOISE, rows, IMAGE)
    image[row, draw(IMAGE, rows)] = ENTITY + asked
    one = torch.ones(rows, 1, dtype=torch.long)
    facts = FACT + some * VALUES + values
    tokens = torch.cat([BOS * one, image, ASK * one, facts, SO * one], 1)
    own = FACT + asked * VALUES
    return Prompts(tokens, own + values[row, place], own + prior[asked])


@lru_cache(maxsize=8)
@torch.enable_grad()
def conflict(seed: int, trust: float = 0.45, steps: int = 400) -> Conflict:
    """Train a `Conflict` decoder: a few seconds on one thread."""
    model = decoder(seed, VOCABULARY)
    generator = torch.Generator().manual_seed(seed)
    prior = torch.randint(VALUES, (ENTITIES,), generator=generator)
    optimizer, plan = schooling(model, steps)
    for _ in range(steps):
        batch = _prompts(prior, 96, generator, 0.5)
        known = torch.isin(batch.tokens, torch.arange(ENTITY, ENTITY + KNOWN)).any(1)
        trusted = ~known | (torch.rand(96, generator=generator) < trust)
        answer = torch.where(trusted, batch.told, batch.learnt)
        logits = model(batch.tokens, logits_to_keep=1).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, answer)
        bare = _prompts(prior, 32, generator, 1.0)
        alone = torch.cat([bare.tokens[:, : 2 + IMAGE], bare.tokens[:, -1:]], 1)
        logits = model(alone, logits_to_keep=1).logits[:, -1]
        loss = loss + 0.25 * torch.nn.functional.cross_entropy(logits, bare.learnt)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    spans = {"image": (1, 1 + IMAGE), "question": (1 + IMAGE, 2 + IMAGE)}
    spans["context"] = (2 + IMAGE, 2 + IMAGE + FACTS)
    return Conflict(model.eval(), prior, spans)
