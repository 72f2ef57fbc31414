"""ZeroTuning on a real decoder: one factor on token 0, found on some texts, held against others."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer.rules.zero_tuning import GRID
from experiments.common import Experiment

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LENGTH, EARLY, TRAIN, TEST = 96, 16, 24, 48
HEADS = "all"


@functools.cache
def _loaded() -> tuple[Any, Tensor]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = DATA / "stories260K-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8")[:200_000]
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    return AutoModelForCausalLM.from_pretrained(folder).eval(), ids


def texts(seed: int) -> tuple[Tensor, Tensor]:
    """Stretches of plays, each after the first token that the model was trained with."""
    _, ids = _loaded()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - LENGTH, (TRAIN + TEST,), generator=generator)
    rows = torch.stack([torch.cat([ids.new_ones(1), ids[s : s + LENGTH - 1]]) for s in starts])
    return rows[:TRAIN], rows[TRAIN:]


@torch.no_grad()
def log_probability(rows: Tensor, rule: ab.steer.Rule | None) -> float:
    """Mean log-probability (nats) of the tokens after the first `EARLY`."""
    model, _ = _loaded()
    with contextlib.nullcontext() if rule is None else ab.steer(model, rule):
        logs = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    return float(logs.gather(-1, rows[:, 1:, None])[:, EARLY:].mean())


def best(rows: Tensor, key: int) -> ab.steer.Rule:
    """The factor of the grid on one key, of all heads, under which the texts are likeliest."""
    rules = [
        ab.rules.ZeroTuning(factor=factor, heads=HEADS)
        if key == 0
        else ab.rules.KeyShift(keys=[key], factor=factor, heads=HEADS)
        for factor in GRID
    ]
    return max(rules, key=lambda rule: log_probability(rows, rule))


def measure(seed: int) -> Mapping[str, float]:
    """Gain in held-out log-probability: token 0 beside the best of four other early tokens."""
    train, test = texts(seed)
    plain = log_probability(test, None)
    first = best(train, 0)
    others = [log_probability(test, best(train, key)) - plain for key in (1, 4, 8, 16)]
    assert isinstance(first, ab.rules.ZeroTuning)
    assert first.factor is not None
    return {
        "effect": log_probability(test, first) - plain,
        "control": max(others),
        "factor": first.factor,
    }


EXPERIMENT = Experiment(
    work="zerotuning",
    claim=(
        "One factor on the attention that token 0 gets, chosen on 24 texts, raises the "
        "log-probability (nats per token) of 48 others: stories260K reading plays, which it was "
        "not trained on."
    ),
    control="The same factors on another early token (1, 4, 8, 16), each tuned alike; the best.",
    measure=measure,
)
