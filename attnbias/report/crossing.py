"""Measure where a decoder looks in what its encoder read: T5, BART, Whisper and the like."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.report.looking import SEED, Layers, layers_of_tower, untrained
from attnbias.report.towers import RANDOM, CrossSeen, Numbers

FRAME = 0.02
"""Seconds of one position of Whisper's encoder: two frames of ten milliseconds."""


def see_cross(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    source: Sequence[str] | None = None,
    target: Sequence[str] | None = None,
    layers: Layers = "all",
    controls: bool = True,
    seed: int = SEED,
) -> CrossSeen:
    """The cross-attention of an encoder-decoder, with the same of random weights.

    Numbers of each head: entropy of a decoder token's attention over the source, the share that the
    most attended source position receives, and the share that goes to the last position (where many
    models put what they have no use for). One row.

    Args:
        model: a model with a tower "cross". inputs: keyword arguments of one forward, the decoder's
            included (``decoder_input_ids``).
        source: what each encoder position is, such as the tokens; by default seconds for audio,
            numbers else. target: the decoder's tokens, numbers by default.
        layers, controls, seed: as in `see_image`.

    Raises:
        AttnbiasError: several rows, names that do not fit. Refused: no cross-attention.
    """
    chosen = layers_of_tower(model, "cross", layers)
    runs = {"": _look(model, inputs, chosen)}
    if controls:
        runs[RANDOM] = _look(untrained(model, seed), inputs, chosen)
    part = runs[""].tensor("received", "cross")
    if part.values.shape[2] != 1:
        raise AttnbiasError(f"inputs must hold one row, got {part.values.shape[2]}.")
    received = part.select(run=0, batch=0).values  # (layers, heads, source)
    keys = int((~received[0, 0].isnan()).sum())
    queries = runs[""].tensor("entropy", "cross").values.shape[-1]
    names = _names("source", source, keys, seconds="input_features" in inputs)
    tokens = _names("target", target, queries)
    numbers = tuple(part.labels["layer"])
    found = []
    for key, title, unit, meaning, read, even in _kinds(keys):
        tables = {which: read(one) for which, one in runs.items()}
        found.append(
            Numbers(key, title, unit, meaning, numbers, tables.pop(""), tables, even)
        )  # fmt: skip
    shares = received[..., :keys]
    return CrossSeen(
        "cross", names, tokens, numbers, shares * keys, tuple(found)
    )  # fmt: skip


def _kinds(keys: int) -> list[tuple[str, str, str, str, Any, float]]:
    def received(one: Any) -> Tensor:
        values: Tensor = one.tensor("received", "cross").select(run=0, batch=0).values
        return values[..., :keys]

    return [
        ("entropy", "Entropy over the source", "nats",
         "How widely a head spreads the attention of a decoder token over the source: 0 is all on "
         "one position.",
         lambda one: one.tensor("entropy", "cross").select(run=0, batch=0).values.nanmean(-1),
         math.log(keys)),
        ("most", "Attention to the most attended position", "share of attention",
         "The part of the attention that goes to the one source position that receives most, as "
         "the mean over the decoder's tokens.", lambda one: received(one).amax(-1), 1 / keys),
        ("last", "Attention to the last position", "share of attention",
         "The part of the attention that goes to the last source position, as the mean over the "
         "decoder's tokens.", lambda one: received(one)[..., -1], 1 / keys),
    ]  # fmt: skip


def _look(model: nn.Module, inputs: Mapping[str, Any], layers: Any) -> Any:
    from attnbias.hub.modes import evaluating
    from attnbias.observe import observe, statistics

    wanted = [statistics.Received("queries"), statistics.Entropy()]
    with evaluating(model), torch.no_grad(), observe(model, wanted, layers=layers) as seen:
        model(**inputs)
    return seen


def _names(
    which: str, given: Sequence[str] | None, count: int, seconds: bool = False
) -> tuple[str, ...]:
    if given is None:
        return tuple(f"{n * FRAME:.2f} s" if seconds else str(n) for n in range(count))
    if isinstance(given, str) or len(given) != count:
        size = "one text" if isinstance(given, str) else str(len(given))
        raise AttnbiasError(f"{which} must name {count} positions, got {size}.")
    return tuple(str(one) for one in given)
