"""Reports made by hand: even attention everywhere, and whatever a test plants in it."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from attnbias.report.data import Map, ReportData, Word

LAYERS, HEADS = 6, 12
TEXT = "It was the best of times, it was the worst of times"
KINDS = (
    ("first_token", "Attention to the first token", "share of attention", 1 / 13),
    ("entropy", "Entropy", "nats", 2.565),
    ("distance", "Mean distance", "tokens", 4.3),
)


def grid(value: float, spread: float = 0.05, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    draw = random.Random(seed)
    return tuple(
        tuple(value * (1 + draw.uniform(-spread, spread)) for _ in range(HEADS))
        for _ in range(LAYERS)
    )


def planted(rows: Any, cells: dict[tuple[int, int], float]) -> tuple[tuple[float, ...], ...]:
    return tuple(
        tuple(cells.get((i, j), x) for j, x in enumerate(row)) for i, row in enumerate(rows)
    )


def even_map(kind: tuple[str, str, str, float], **changes: Any) -> Map:
    name, title, unit, even = kind
    one = Map(
        statistic=name, tower="text", title=title, unit=unit, meaning=f"Plain words on {title}.",
        layers=tuple(range(LAYERS)), values=grid(even, seed=1), shuffled=grid(even, seed=2),
        random=grid(even, seed=3), even=(even,) * LAYERS,
    )  # fmt: skip
    return replace(one, **changes)


def even_word(text: str, place: int, special: bool = False, **changes: Any) -> Word:
    word = Word(
        text=text, special=special, tokens=(place, place + 1), share=1 / 13, received=1.0,
        by_layer=(1.0,) * LAYERS, shuffled=1.01, in_place=1.02, random=0.99,
    )  # fmt: skip
    return replace(word, **changes)


def even_data(text: str = TEXT, **changes: Any) -> ReportData:
    pieces = ["[CLS]", *text.split(), "[SEP]"]
    data = ReportData(
        model="a-model", revision="0" * 40, architecture="BertModel", causal=False, text=text,
        tokens=tuple(pieces),
        words=tuple(even_word(p, i, p in ("[CLS]", "[SEP]")) for i, p in enumerate(pieces)),
        layers=tuple(("text", n) for n in range(LAYERS)),
        maps=tuple(even_map(kind) for kind in KINDS), version="0.1.0",
        settings=(("Command", "attnbias observe a-model --text a.txt"),),
    )  # fmt: skip
    return replace(data, **changes)


def sink_data(**changes: Any) -> ReportData:
    """Three heads with a first-token sink, two of which stay when the words are shuffled."""
    first, *rest = even_data().maps
    first = replace(
        first,
        values=planted(first.values, {(1, 3): 0.66, (2, 5): 0.41, (4, 0): 0.33}),
        shuffled=planted(first.shuffled, {(1, 3): 0.62, (2, 5): 0.40}),
    )
    words = list(even_data().words)
    words[0] = replace(
        words[0],
        received=6.2,
        in_place=6.0,
        share=0.477,
        by_layer=(2.0, 8.5, 9.0, 7.0, 6.0, 4.7),
        shuffled=6.0,
    )
    return replace(even_data(), maps=(first, *rest), words=tuple(words), **changes)
