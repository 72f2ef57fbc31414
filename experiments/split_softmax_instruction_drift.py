"""Split-softmax on a decoder that follows its first tokens, in dialogues longer than it knows."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from experiments._tiny import decoder, schooling
from experiments.common import Experiment

BOS, ASK, MODES, WORDS = 0, 1, 6, 20
MODE, REPLY, WORD = 2, 2 + MODES, 2 + 2 * MODES
VOCABULARY = WORD + WORDS
SYSTEM = (1, 3)
POWERS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
SHORT, LONG, ROWS = 12, 112, 128


def dialogues(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """``BOS | mode mode | dialogue | ASK`` and the reply that the mode asks for.

    One word in five of the dialogue is a mode too, said by somebody who has nothing to say.
    """
    mode = torch.randint(MODES, (rows, 1), generator=generator)
    said = WORD + torch.randint(WORDS, (rows, length), generator=generator)
    other = MODE + torch.randint(MODES, (rows, length), generator=generator)
    said = torch.where(torch.rand(rows, length, generator=generator) < 0.2, other, said)
    one = torch.ones(rows, 1, dtype=torch.long)
    tokens = torch.cat([BOS * one, MODE + mode, MODE + mode, said, ASK * one], 1)
    return tokens, REPLY + mode[:, 0]


@lru_cache(maxsize=8)
def trained(seed: int, steps: int = 200) -> Any:
    """Train on dialogues of 2 to `SHORT` words: a few seconds on one thread."""
    model = decoder(seed, VOCABULARY, key_heads=2, length=128)
    generator = torch.Generator().manual_seed(seed)
    optimizer, plan = schooling(model, steps)
    for step in range(steps):
        tokens, reply = dialogues(64, 2 + step % (SHORT - 1), generator)
        logits = model(tokens, logits_to_keep=1).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, reply)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plan.step()
    return model.eval()


@torch.no_grad()
def follows(
    model: Any, data: tuple[Tensor, Tensor], power: float, span: tuple[int, int] = SYSTEM
) -> float:
    """Mean log-probability (nats) of the reply, which is generated: the dialogue is in a cache."""
    tokens, reply = data
    rule = ab.rules.SplitSoftmax(power=power, heads="all")
    plain = power == 1
    spans = {"system": span}
    with contextlib.nullcontext() if plain else ab.steer(model, rule, spans=spans):
        cache = model(tokens[:, :-1], use_cache=True).past_key_values
        logits = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    logs = logits.double().log_softmax(-1)
    return float(logs.gather(1, reply[:, None]).mean())


def measure(seed: int) -> Mapping[str, float]:
    """Gain in long dialogues, the power chosen on others; then for other words.

    The two words right behind the system prompt have read it in the first layer, and attending to
    them does nearly as well in some seeds; that is recorded beside the control.
    """
    model = trained(seed)
    generator = torch.Generator().manual_seed(900 + seed)
    tune = dialogues(ROWS, LONG, generator)
    test = dialogues(ROWS, LONG, generator)
    short = dialogues(ROWS, SHORT, generator)
    plain = follows(model, test, 1.0)
    found: dict[str, float] = {"long": plain, "short": follows(model, short, 1.0)}
    middle = SYSTEM[1] + LONG // 2
    for name, span in (
        ("effect", SYSTEM),
        ("control", (middle, middle + 2)),
        ("next_words", (SYSTEM[1], SYSTEM[1] + 2)),
    ):
        power = max(POWERS, key=lambda one, span=span: follows(model, tune, one, span))  # type: ignore[misc]
        found[name] = follows(model, test, power, span) - plain
        found[f"power_{name}"] = power
        if span[1] <= SHORT:
            found[f"short_{name}"] = follows(model, short, power, span) - found["short"]
    return found


EXPERIMENT = Experiment(
    work="split-softmax-instruction-drift",
    claim=(
        "Raising the share of the system prompt to a power, at the token that is generated, raises "
        "the log-probability of the reply that it asks for in dialogues nine times as long as any "
        "in training."
    ),
    control="The same, its power chosen in the same way, on two words amid the dialogue.",
    measure=measure,
)
