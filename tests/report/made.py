"""Reports made by hand: even attention everywhere, and whatever a test plants in it."""

from __future__ import annotations

import base64
import random
from dataclasses import replace
from typing import Any

from attnbias.report.data import Map, Profile, ReportData, Word

LAYERS, HEADS = 6, 12
SHARE = "share of attention"
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


def wide_data(layers: int, heads: int, tokens: int, words: int | None = None) -> ReportData:
    """A report of a size: every field filled, numbers drawn from a seed."""
    from attnbias.report import interval
    from attnbias.report.profiles import bins, gaps, keeps_maps

    draw = random.Random(5)
    names = [
        *KINDS, ("previous_token", "Attention to the previous token", SHARE, 0.01),
        ("next_token", "Attention to the next token", SHARE, 0.01),
        ("own_token", "Attention to the token itself", SHARE, 0.01),
        ("last_token", "Attention to the last token", SHARE, 0.01),
        ("received", "Attention to the most attended token", SHARE, 0.01),
        ("sink_rate", "Sink heads", "yes or no", 0.0), ("peak", "Largest weight", SHARE, 0.01),
        ("a", "A", "value", 1.0), ("b", "B", "value", 1.0),
    ]  # fmt: skip

    def drawn(scale: float = 1.0) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(scale * draw.random() for _ in range(heads)) for _ in range(layers))

    maps = tuple(
        Map(
            name, "text", title, unit, f"Plain words on {title}.", tuple(range(layers)), drawn(),
            drawn(), drawn(), (even,) * layers, drawn(0.9), drawn(1.1),
        )
        for name, title, unit, even in names
    )  # fmt: skip
    starts, between = bins(tokens), gaps(tokens)
    kept = ""
    if keeps_maps(layers * heads, tokens):
        kept = base64.b64encode(draw.randbytes(tokens * tokens)).decode()

    def row(size: int) -> tuple[float, ...]:
        return tuple(round(draw.random() / size, 6) for _ in range(size))

    profiles = tuple(
        Profile(
            "text", layer, head, row(len(starts)),
            tuple((draw.randrange(tokens), 0.5 / (n + 1)) for n in range(min(64, tokens))),
            row(len(between)), row(len(between)), row(len(between)), kept,
        )
        for layer in range(layers)
        for head in range(heads)
    )  # fmt: skip
    count = tokens if words is None else words
    vocabulary = ["the", "queen", "walked", "slowly", "towards", "an", "old", "harbour", "unseen"]
    text = [draw.choice(vocabulary) for _ in range(count)]
    made = tuple(
        Word(
            text=word, special=False, tokens=(n, n + 1), share=1 / count,
            received=2 * draw.random(), by_layer=tuple(draw.random() for _ in range(layers)),
            shuffled=1.0, in_place=1.0, random=1.0, gap="\n\n" if n % 90 == 89 else " ",
        )
        for n, word in enumerate(text)
    )  # fmt: skip
    return ReportData(
        model="wide-model", revision="1" * 40, architecture="LlamaForCausalLM", causal=True,
        text=" ".join(text), tokens=tuple(text[n % count] for n in range(tokens)), words=made,
        layers=tuple(("text", n) for n in range(layers)), maps=maps, version="0.1.0",
        profiles=profiles, bins=starts, even_received=(row(len(starts)),) * layers,
        gaps=between, even_near=(row(len(between)),) * layers, blocks=interval.blocks(tokens),
        sampled=min(tokens, 1024),
    )  # fmt: skip
