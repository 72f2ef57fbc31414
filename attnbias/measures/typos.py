"""Texts with one word whose letters are scrambled, and with other words blanked."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any

BLANK = "_"
TRIES, SHUFFLES = 10, 3


def scramble(word: str, ratio: float, dice: random.Random) -> str:
    """A word with a part of its inner letters shuffled; the first and the last letter stay.

    A random contiguous piece of ``max(1, int(ratio * inner letters))`` is shuffled, anew until it
    differs (30 times at most); so at ratio 0 nothing changes.
    """
    inner = word[1:-1]
    size = min(max(1, int(len(inner) * ratio)), len(inner))
    for _ in range(TRIES):
        start = dice.randint(0, len(inner) - size)
        piece = inner[start : start + size]
        for _ in range(SHUFFLES):
            letters = list(piece)
            dice.shuffle(letters)
            if letters != list(piece):
                return word[0] + inner[:start] + "".join(letters) + inner[start + size :] + word[-1]
    return word


@dataclass(frozen=True)
class Typo:
    """A text with the characters (start, stop) of its changed word."""

    text: str
    start: int
    stop: int

    @property
    def word(self) -> str:
        return self.text[self.start : self.stop]


def candidates(text: str, tokenizer: Any, letters: int, whole: bool) -> list[int]:
    """The words, by number, that may be changed: in the middle third of the text where there are.

    Of letters alone, more than `letters`, there once; with `whole` a single token.
    """
    words = text.split()

    def fits(word: str) -> bool:
        if len(word) <= letters or not re.fullmatch("[A-Za-z]+", word) or words.count(word) > 1:
            return False
        return not whole or len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1

    found = [n for n, word in enumerate(words) if fits(word)]
    middle = [n for n in found if len(words) // 3 <= n < 2 * len(words) // 3]
    return middle or found


def variants(
    text: str, at: int, ratios: tuple[float, ...], blank: float, dice: random.Random
) -> tuple[Typo, list[Typo]]:
    """The text with its word intact, and with it scrambled by each ratio.

    The same share of the other words is blanked in all of them.
    """
    words = text.split()
    others = [n for n in range(len(words)) if n != at]
    gone = set(dice.sample(others, int(len(others) * blank)))
    kept = [BLANK if n in gone else word for n, word in enumerate(words)]

    def built(word: str) -> Typo:
        before = "".join(f"{w} " for w in kept[:at])
        after = "".join(f" {w}" for w in kept[at + 1 :])
        return Typo(before + word + after, len(before), len(before) + len(word))

    intact = words[at]
    return built(intact), [built(scramble(intact, ratio, dice)) for ratio in ratios]
