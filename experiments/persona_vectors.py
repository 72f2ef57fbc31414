"""Persona vectors on a real decoder: two styles of text, told apart and brought out."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from experiments.common import Experiment

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LAYER, PROMPT, LENGTH, COUNT = 2, 8, 40, 24
STRENGTHS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@functools.cache
def _loaded() -> tuple[Any, Tensor, Tensor]:
    """The model, tokens of plays, and stories that the model itself has told."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DATA / "stories260K-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")[:200_000]
    plays = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return model, plays, _told(model, torch.ones(8 * COUNT, 1, dtype=torch.long), None, 0, LENGTH)


@torch.no_grad()
def _told(
    model: Any, prompts: Tensor, rule: ab.steer.Rule | None, seed: int, length: int
) -> Tensor:
    """Sampled continuations, the prompt included."""
    with (
        torch.random.fork_rng(),
        contextlib.nullcontext() if rule is None else ab.steer(model, rule),
    ):
        torch.manual_seed(seed)
        found = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            top_k=0,
            min_new_tokens=length - prompts.shape[1],
            max_new_tokens=length - prompts.shape[1],
            pad_token_id=0,
        )
    return torch.as_tensor(found)


def _answers(rows: Tensor) -> list[ab.rules.Response]:
    return [ab.rules.Response({"input_ids": row[None]}, PROMPT) for row in rows]


def _ranked(high: list[float], low: list[float]) -> float:
    """The probability that one of `high` is above one of `low`."""
    wins = [float(a > b) + 0.5 * float(a == b) for a in high for b in low]
    return sum(wins) / len(wins)


def measure(seed: int) -> Mapping[str, float]:
    """The vector of one half of the texts, on the other half and on what is generated."""
    model, plays, stories = _loaded()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(plays) - LENGTH, (2 * COUNT,), generator=generator)
    played = torch.stack(
        [torch.cat([plays.new_ones(1), plays[s : s + LENGTH - 1]]) for s in starts]
    )
    told = stories[torch.randperm(len(stories), generator=generator)[: 2 * COUNT]]
    rule = ab.rules.PersonaVector(layers=(LAYER,)).fit(
        model, _answers(played[:COUNT]), _answers(told[:COUNT]), progress=False
    )
    vector = torch.tensor((rule.directions or ())[0].vectors[0])
    other = torch.randn(len(vector), generator=generator)
    other *= vector.norm() / other.norm()
    randomly = ab.rules.PersonaVector(layers=(LAYER,), directions={LAYER: other})

    # A token's log-odds of plays over stories, from the texts of the fit: what generation is
    # judged by.
    counts = [torch.bincount(rows.flatten(), minlength=512) + 1.0 for rows in (played, told)]
    ratio = (counts[0] / counts[0].sum()).log() - (counts[1] / counts[1].sum()).log()
    prompts = stories[torch.randperm(len(stories), generator=generator)[:COUNT]][:, :PROMPT]

    def style(rule: ab.rules.PersonaVector, strength: float) -> float:
        steered = ab.rules.PersonaVector(directions=rule.directions, strength=strength)
        return float(ratio[_told(model, prompts, steered, seed, LENGTH)[:, PROMPT:]].mean())

    def apart(rule: ab.rules.PersonaVector) -> float:
        high, low = (
            [rule.projection(model, one)[LAYER] for one in _answers(rows[COUNT:])]
            for rows in (played, told)
        )
        return _ranked(high, low)

    styles = [style(rule, strength) for strength in STRENGTHS]
    return {
        "effect": styles[-1] - styles[0],
        "control": abs(style(randomly, STRENGTHS[-1]) - style(randomly, STRENGTHS[0])),
        "rises_of_4": float(sum(b > a for a, b in itertools.pairwise(styles))),
        "told_apart": apart(rule),
        "told_apart_random": apart(randomly),
        **{
            f"style_{strength:+g}": value for strength, value in zip(STRENGTHS, styles, strict=True)
        },
    }


EXPERIMENT = Experiment(
    work="persona-vectors",
    claim="The difference of mean hidden states between two styles of text moves what the model "
    "goes on to write towards one of them, between strengths -2 and 2 (mean log-odds of a token, "
    "nats), and tells held-out texts apart.",
    control="A random direction of the same length: the size of its change.",
    measure=measure,
)
