"""Each head as a classifier: does it look from a word to the one that it belongs to?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure
from attnbias.measures.scores import Scores
from attnbias.measures.word_maps import Rows, WordMaps, checked_words

Relation = tuple[int, tuple[int, ...], str]
OFFSETS = (-3, -2, -1, 1, 2, 3)


@dataclass(frozen=True)
class HeadRelations(HeadMeasure):
    r"""How often a head's most attended word is the right one.

    .. math:: \hat w = \arg\max_{v \ne w} A_{wv} \quad\text{("from")}, \qquad
              \hat w = \arg\max_{v \ne w} A_{vw} \quad\text{("to")}

    over the word map of `WordMaps`; the word itself and tokens of no word do not count. One sample
    is one related word: 1 where the answer is right, else 0. For dependencies the answer is the
    syntactic head; for coreference any antecedent.

    Args:
        words: as in `WordMaps`, -1 for special tokens.
        relations: for each row ``(word, answer, label)``; the answer is a word, or several of which
            any is right.
        relation: the label that counts; None counts all.
        direction: "from" the word to the answer, "to" the word from the answer.
        tower: which one; by default "text", or the only one.

    Returns:
        `Scores`; ``details["offsets"]`` has the accuracy of always naming the word at a fixed
        offset (-3 to 3; outside of the sentence is wrong), the baseline, and
        ``details["best offset"]`` the best of them.

    Cost: that of `WordMaps`.

    Raises:
        AttnbiasError: rows that do not fit, words that do not exist, no relation of that label.

    Source: What Does BERT Look At? An Analysis of BERT's Attention (2019, arXiv 1906.04341),
    sections 4.2 and 4.3; authors' code read. Its offsets are -3 to 2; its rule for possessives
    belongs to one treebank and is left out.
    """

    name: ClassVar[str] = "head_relations"
    words: Rows = field(repr=False)
    relations: tuple[tuple[Relation, ...], ...] = field(repr=False)
    relation: str | None = None
    direction: Literal["from", "to"] = "from"
    tower: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", checked_words(self.words))
        object.__setattr__(self, "relations", checked_relations(self.words, self.relations))
        if self.direction not in ("from", "to"):
            raise AttnbiasError(f"direction must be 'from' or 'to', got {self.direction!r}.")
        if not self._items():
            raise AttnbiasError(f"there is no relation {self.relation!r} among the relations.")

    def _items(self) -> list[tuple[int, int, tuple[int, ...]]]:
        return [
            (row, word, answers)
            for row, related in enumerate(self.relations)
            for word, answers, label in related
            if self.relation in (None, label)
        ]

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        found = WordMaps(self.words, self.tower).measure(model, data, progress=progress)
        hits = []
        for row, word, answers in self._items():
            table = found.maps[row]
            line = table[:, :, word] if self.direction == "from" else table[..., word]
            others = torch.arange(line.shape[-1]) != word
            best = torch.where(others & ~line.isnan(), line, -1.0).argmax(-1)
            right = torch.isin(best, torch.tensor(answers))
            there = ~line.isnan().all(-1)  # layers may differ in their number of heads
            hits.append(torch.where(there, right.double(), torch.nan))
        details = baseline(self.words, self._items())
        return Scores(self.name, found.tower, found.layers, torch.stack(hits), details=details)


def checked_relations(words: Rows, relations: Any) -> tuple[tuple[Relation, ...], ...]:
    """Relations as tuples with several answers each; words must exist."""
    if len(relations) != len(words):
        raise AttnbiasError(f"relations has {len(relations)} rows, and words {len(words)}.")
    found = []
    for number, (row, related) in enumerate(zip(words, relations, strict=True)):
        here = []
        for word, answer, label in related:
            answers = (answer,) if isinstance(answer, int) else tuple(answer)
            if not answers or any(not 0 <= w <= max(row) for w in (word, *answers)):
                raise AttnbiasError(
                    f"relations[{number}] names the words {word} and {answers}, and the row has "
                    f"0 to {max(row)}."
                )
            here.append((int(word), answers, str(label)))
        found.append(tuple(here))
    return tuple(found)


def baseline(words: Rows, items: list[tuple[int, int, tuple[int, ...]]]) -> dict[str, Any]:
    """The accuracy of a fixed offset, for each of `OFFSETS`, and the best."""
    offsets = {by: sum(w + by in a for _, w, a in items) / len(items) for by in OFFSETS}
    best = max(offsets, key=lambda by: (offsets[by], -abs(by)))
    return {"offsets": offsets, "best offset": best, "best offset accuracy": offsets[best]}
