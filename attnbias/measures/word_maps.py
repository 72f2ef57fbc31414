"""Attention between words instead of pieces of words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.measures.losses import tower_sites
from attnbias.observe.observer import observe
from attnbias.observe.statistics import Share

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Words:
    """Word maps.

    Attributes:
        tower, layers: of the model.
        maps: for each row of the data ``(layers, heads, words, words)`` float64: from the word of
            the second last axis to the word of the last.
    """

    tower: str
    layers: tuple[int, ...]
    maps: tuple[Tensor, ...] = field(repr=False)


@dataclass(frozen=True)
class WordMaps(Measure):
    r"""The attention of each head from word to word.

    .. math:: A_{wv} = \frac{1}{|w|} \sum_{i \in w} \sum_{j \in v} p_{ij}

    Attention to the pieces of a word is summed, attention from them is averaged: where every token
    belongs to a word, the rows of the map still sum to 1.

    Args:
        words: for each row of the data the number of the word of each real token (padding left
            out), from 0 without gaps; -1 for a token of no word, such as [CLS]. With a fast
            tokenizer: ``[-1 if w is None else w for w in encoding.word_ids()]``.
        tower: which one; by default "text", or the only one.

    Returns:
        `Words`.

    Cost: one forward, and for each layer one unbiased call for as many words as a head has
    dimensions; the result is O(words^2) for each head.

    Raises:
        AttnbiasError: rows or tokens that do not fit the data, numbers with gaps.

    Source: What Does BERT Look At? An Analysis of BERT's Attention (2019, arXiv 1906.04341),
    section 4.1; authors' code read.
    """

    name: ClassVar[str] = "word_maps"
    words: Rows = field(repr=False)
    tower: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", checked_words(self.words))

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Words:
        given, where = forwards(data, "WordMaps"), tower_sites(model, self.tower)
        tower, layers = where[0].tower, [site.layer for site in where]
        maps: list[Tensor] = []
        with evaluating(model), torch.no_grad(), bar(len(given), "word maps", progress) as tick:
            for inputs in given:
                rows = self.words[len(maps) : len(maps) + rows_of(inputs)]
                if len(rows) < rows_of(inputs):
                    raise AttnbiasError(
                        f"words has {len(self.words)} rows, and the data have more."
                    )
                spans = word_spans(rows)
                with observe(model, [Share()], spans=spans, layers={tower: layers}) as seen:
                    model(**inputs)
                values = seen.tensor("share", tower).values[0]  # layer, batch, head, query, word
                for number, row in enumerate(rows):
                    maps.append(_merged(values[:, number], row, len(maps)))
                tick()
        if len(maps) < len(self.words):
            raise AttnbiasError(f"words has {len(self.words)} rows, and the data {len(maps)}.")
        return Words(tower, tuple(layers), tuple(maps))


def checked_words(words: Iterable[Iterable[int]]) -> Rows:
    """Words as tuples; every number from 0 to the largest must be there."""
    found = tuple(tuple(int(w) for w in row) for row in words)
    for number, row in enumerate(found):
        here = {w for w in row if w >= 0}
        if not here or here != set(range(max(here) + 1)):
            raise AttnbiasError(
                f"words[{number}] must number the words from 0 without gaps (-1 for none), got "
                f"{row[:12]}."
            )
    return found


def rows_of(inputs: Mapping[str, Any]) -> int:
    """How many rows a forward has."""
    return len(next(value for value in inputs.values() if isinstance(value, Tensor)))


def word_spans(rows: Rows) -> dict[str, Tensor]:
    """The words of each row as spans of token positions, for `observe`."""
    longest, most = max(len(row) for row in rows), max(max(row) for row in rows) + 1
    table = torch.full((len(rows), longest), -1)
    for number, row in enumerate(rows):
        table[number, : len(row)] = torch.tensor(row)
    return {str(word): table == word for word in range(most)}


def _merged(values: Tensor, row: tuple[int, ...], number: int) -> Tensor:
    """``(layers, heads, words, words)`` of one row, from (layers, heads, queries, words)."""
    real = ~values.isnan().all(-1).all(0).all(0)
    if int(real.sum()) != len(row) or not bool(real[: len(row)].all()):
        raise AttnbiasError(
            f"words[{number}] has {len(row)} tokens, and row {number} of the data has "
            f"{int(real.sum())}."
        )
    words = torch.tensor(row)
    count = int(words.max()) + 1
    belongs = (words == torch.arange(count)[:, None]).double()
    mean = belongs / belongs.sum(1, keepdim=True)
    return mean @ values[:, :, : len(row), :count]
