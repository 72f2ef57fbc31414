"""A text as tokens and words, and the same with its words shuffled."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from attnbias.errors import AttnbiasError


@dataclass(frozen=True)
class Piece:
    """A word (or one special token): text, token positions (start, stop), the space after it."""

    text: str
    special: bool
    start: int
    stop: int
    gap: str = " "


@dataclass(frozen=True)
class Read:
    """A text as a model reads it: token ids and names, and the words that they make up."""

    text: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]
    words: tuple[Piece, ...]


def read(text: str, tokenizer: Any, most: int | None, max_tokens: int | None = None) -> Read:
    """Tokenise; a text longer than the model accepts is refused unless `max_tokens` cuts it.

    Args:
        text: the text. tokenizer: a Hugging Face tokenizer.
        most: tokens the model accepts, None for no limit.
        max_tokens: keep this many tokens at most, special tokens included.

    Raises:
        AttnbiasError: an empty or one-word text, a text too long, a bad `max_tokens`.
    """
    if max_tokens is not None and (max_tokens < 3 or (most is not None and max_tokens > most)):
        within = "of 3 or more" if most is None else f"from 3 to {most}, which the model accepts"
        raise AttnbiasError(f"max_tokens: {max_tokens} came; write a number {within}")
    options = {} if max_tokens is None else {"truncation": True, "max_length": max_tokens}
    offsets = bool(getattr(tokenizer, "is_fast", False))
    coded = tokenizer(
        text, return_offsets_mapping=offsets, return_special_tokens_mask=True, verbose=False,
        **options,
    )  # fmt: skip
    ids = tuple(int(i) for i in coded["input_ids"])
    if most is not None and len(ids) > most:
        raise AttnbiasError(
            f"text: {len(ids)} tokens came, but the model accepts {most}; shorten the text, or "
            f"write --max-tokens {most} to use its beginning"
        )
    special = [bool(flag) for flag in coded["special_tokens_mask"]]
    if sum(not flag for flag in special) < 2:
        raise AttnbiasError("text: fewer than two tokens came; give a text of some words")
    names = tuple(_plain(name) for name in tokenizer.convert_ids_to_tokens(list(ids)))
    spans = [tuple(pair) for pair in coded["offset_mapping"]] if offsets else None
    words = _words(text, names, special, spans)
    kept = text if max_tokens is None or spans is None else text[: max(stop for _, stop in spans)]
    return Read(kept, ids, names, words)


def shuffled(words: tuple[Piece, ...], seed: int) -> tuple[int, ...]:
    """Token positions in the order of the shuffled text: new position -> old position.

    Words move as wholes, their tokens stay in order; special tokens keep their places.
    """
    movable = [word for word in words if not word.special]
    order = movable.copy()
    random.Random(seed).shuffle(order)
    queue = iter(order)
    places: list[int] = []
    for word in words:
        chosen = word if word.special else next(queue)
        places.extend(range(chosen.start, chosen.stop))
    return tuple(places)


def _plain(name: Any) -> str:
    """A token's name without the marks that tokenizers write for a space."""
    text = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
    return text.replace("Ġ", " ").replace("▁", " ").replace("Ċ", "\n").strip(" ") or text


def _words(
    text: str, names: tuple[str, ...], special: list[bool], spans: list[tuple[int, int]] | None
) -> tuple[Piece, ...]:
    """Join tokens to words: runs without white space, found by the tokens' places in the text."""
    found: list[Piece] = []
    last_start = -1
    for place, (name, flag) in enumerate(zip(names, special, strict=True)):
        if flag or spans is None:
            found.append(Piece(name, flag, place, place + 1))
            last_start = -1
            continue
        start, stop = _bounds(text, *spans[place])
        if start == last_start and found:
            old = found[-1]
            found[-1] = Piece(old.text, False, old.start, place + 1, old.gap)
            continue
        shown = text[start:stop]
        rest = text[stop:]
        gap = rest[: len(rest) - len(rest.lstrip())] if shown.strip() else ""
        shown = shown if shown.strip() else shown.replace("\n", "⏎").replace(" ", "␣") or name
        found.append(Piece(shown, False, place, place + 1, gap))
        last_start = start
    return tuple(found)


def _bounds(text: str, start: int, stop: int) -> tuple[int, int]:
    """Where the word lies that a token at (start, stop) belongs to.

    Spaces right before a word belong to it; other white space, such as an empty line, is a word.
    """
    inside = next((i for i in range(start, stop) if not text[i].isspace()), None)
    before = text[start:stop].strip(" ") == "" and not text[stop : stop + 1].isspace()
    if inside is None and before and start < stop < len(text):
        inside = stop
    if inside is None:
        return start, stop
    left = right = inside
    while left > 0 and not text[left - 1].isspace():
        left -= 1
    while right < len(text) and not text[right].isspace():
        right += 1
    return left, right
