"""StreamingLLM on a real small decoder: the token that begins every text, kept beside a window."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

import attnbias as ab
from experiments.common import Experiment
from experiments.zerotuning import _loaded

TEXTS, LENGTH, EARLY, KEYS = 24, 192, 48, 32


def texts(seed: int) -> Tensor:
    """Stretches of plays, each after the first token that the model was trained with."""
    _, ids = _loaded()
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - LENGTH, (TEXTS,), generator=generator)
    return torch.stack([torch.cat([ids.new_ones(1), ids[s : s + LENGTH - 1]]) for s in starts])


@torch.no_grad()
def log_probability(rows: Tensor, rule: ab.steer.Rule | None) -> float:
    """Mean log-probability (nats) of the tokens after the first `EARLY`."""
    model, _ = _loaded()
    with contextlib.nullcontext() if rule is None else ab.steer(model, rule):
        logs = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    return float(logs.gather(-1, rows[:, 1:, None])[:, EARLY:].mean())


def measure(seed: int) -> Mapping[str, float]:
    """Log-probabilities against whole attention; `KEYS` keys before the query in every case."""
    rows = texts(seed)
    whole = log_probability(rows, None)

    def change(sinks: int, positions: str) -> float:
        rule = ab.rules.StreamingLLM(
            sinks=sinks,
            recent=KEYS - sinks,
            positions=positions,  # type: ignore[arg-type]
            heads="all",
        )
        return log_probability(rows, rule) - whole

    return {
        "effect": change(1, "text"),
        "control": change(0, "text"),
        "one_in_cache": change(1, "cache"),
        "four": change(4, "text"),
        "four_in_cache": change(4, "cache"),
        "whole": whole,
    }


EXPERIMENT = Experiment(
    work="streaming-llm",
    claim=(
        "On a decoder whose texts all begin with the same token, that token and a window of 31 "
        "more keep more of the log-probability than a window alone (positions as in the text)."
    ),
    control="A window of as many keys without the first token.",
    measure=measure,
)
