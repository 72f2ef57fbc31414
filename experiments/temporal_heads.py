"""Heads in the circuits of dated facts alone: without them dated facts are lost, others stay."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures import Scores, TemporalHeads
from experiments._tiny import schooling
from experiments.common import Experiment

# Tokens: 0 begins, 1 to 3 are years, 4 says there is none; then subjects, relations, objects.
YEARS, SUBJECTS, DATED, ALWAYS, OBJECTS = 3, 16, 3, 3, 24
SUBJECT, RELATION = 5, 5 + SUBJECTS
OBJECT = RELATION + DATED + ALWAYS
STEPS, DRAWS = 300, 6
MEASURE = TemporalHeads(steps=10)  # edges and threshold as published


def facts(seed: int) -> tuple[Tensor, Tensor]:
    """Objects ``(subjects, relations, years)`` of dated facts, ``(subjects, relations)`` of others.

    A subject's objects of different years differ.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(SUBJECTS, DATED, OBJECTS, generator=generator).argsort(-1)
    always = torch.randint(OBJECTS, (SUBJECTS, ALWAYS), generator=generator)
    return OBJECT + order[..., :YEARS], OBJECT + always


def prompts(relation: int, year: int | None) -> Tensor:
    """``(subjects, 4)``: begin, year, subject, relation."""
    subject = SUBJECT + torch.arange(SUBJECTS)
    place = RELATION + relation + (DATED if year is None else 0)
    time = 4 if year is None else 1 + year
    parts = [torch.full_like(subject, 0), torch.full_like(subject, time), subject]
    return torch.stack([*parts, torch.full_like(subject, place)], 1)


def decoder(seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=OBJECT + OBJECTS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=16,
        head_dim=4,
        intermediate_size=128,
        max_position_embeddings=16,
        bos_token_id=0,
        pad_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def everything(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All prompts, their objects, and which of them are dated."""
    dated, always = facts(seed)
    rows = [(prompts(r, y), dated[:, r, y], True) for r in range(DATED) for y in range(YEARS)]
    rows += [(prompts(r, None), always[:, r], False) for r in range(ALWAYS)]
    kinds = torch.cat([torch.full((SUBJECTS,), kind) for *_, kind in rows])
    return torch.cat([ids for ids, *_ in rows]), torch.cat([o for _, o, _ in rows]), kinds


def train(seed: int, steps: int = STEPS) -> Any:
    """All facts in each batch, dated ones weighted so that both kinds count alike."""
    model = decoder(seed)
    ids, objects, kinds = everything(seed)
    optimizer, plan = schooling(model, steps)
    weight = torch.where(kinds, 0.5 / kinds.double().mean(), 0.5 / (~kinds).double().mean())
    for _ in range(steps):
        logits = model(input_ids=ids).logits[:, -1]
        each = torch.nn.functional.cross_entropy(logits, objects, reduction="none")
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward((each * weight).mean())
        optimizer.step()
        plan.step()
    return model.eval()


def circuits(seed: int) -> list[dict[str, Any]]:
    """A circuit for each relation and year (the next year as corruption), and for facts without."""
    dated, always = facts(seed)
    found: list[dict[str, Any]] = []
    for relation in range(DATED):
        for year in range(YEARS):
            other = (year + 1) % YEARS
            found.append(
                _circuit(
                    prompts(relation, year),
                    prompts(relation, other),
                    dated[:, relation, year],
                    dated[:, relation, other],
                    f"year {year}",
                )
            )
    for relation in range(ALWAYS):
        ids, own = prompts(relation, None), always[:, relation]
        found.append(_circuit(ids, ids.roll(1, 0), own, own.roll(1), None))
    return found


def _circuit(clean: Tensor, other: Tensor, answer: Tensor, wrong: Tensor, time: Any) -> Any:
    keep = answer != wrong
    return {
        "clean": {"input_ids": clean[keep]},
        "corrupted": {"input_ids": other[keep]},
        "answer": answer[keep],
        "wrong": wrong[keep],
        "time": time,
    }


@torch.no_grad()
def recalled(model: Any, seed: int, heads: Any = ()) -> tuple[float, float]:
    """The mean probability of the right object among all objects: dated facts, and others."""
    ids, objects, kinds = everything(seed)
    if heads:
        with ab.steer(model, ab.rules.BlockHeads(heads=tuple(heads))):
            logits = model(input_ids=ids).logits[:, -1]
    else:
        logits = model(input_ids=ids).logits[:, -1]
    chance = logits[:, OBJECT:].double().softmax(-1)
    own = chance.gather(1, objects[:, None] - OBJECT)[:, 0]
    return float(own[kinds].mean()), float(own[~kinds].mean())


def heads_of(scores: Scores) -> tuple[tuple[int, int], ...]:
    """The temporal heads."""
    found: tuple[tuple[int, int], ...] = scores.details["temporal"]
    return found


def measure(seed: int) -> Mapping[str, float]:
    """By how much more dated facts are lost than others, without the temporal heads."""
    model = train(seed)
    scores = MEASURE.measure(model, circuits(seed))
    plain, found = recalled(model, seed), heads_of(scores)
    gone = recalled(model, seed, found)
    others = [recalled(model, seed, scores.others(found, draw)) for draw in range(DRAWS)]

    def loss(after: tuple[float, float]) -> float:
        return (plain[0] - after[0]) - (plain[1] - after[1])

    return {
        "effect": loss(gone) if found else 0.0,
        "control": mean(loss(other) for other in others) if found else 0.0,
        "temporal_heads": float(len(found)),
        "dated": plain[0],
        "always": plain[1],
        "dated_without": gone[0],
        "always_without": gone[1],
        "dated_without_others": mean(other[0] for other in others),
        "always_without_others": mean(other[1] for other in others),
    }


EXPERIMENT = Experiment(
    work="temporal-heads",
    claim=(
        "A decoder of two layers of 16 heads learns facts with a year and facts without: "
        "zeroing the heads that stand in circuits of dated facts alone costs more of the dated "
        "facts than of the others."
    ),
    control="As many other heads set to zero, the mean of six draws.",
    measure=measure,
    seeds=(0, 1, 2),
)
