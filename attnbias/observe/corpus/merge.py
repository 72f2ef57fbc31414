"""From journals to the table: the records in the order of the documents, added up one by one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from attnbias.errors import AttnbiasError
from attnbias.observe.corpus.folder import Cell, Folder, Record, opened
from attnbias.observe.corpus.intervals import INTERVALS, BootstrapMeans, Means, TMeans
from attnbias.observe.corpus.table import CorpusRow, CorpusTable


def load(
    path: str | os.PathLike[str], *, confidence: float = 0.95, interval: str = "t"
) -> CorpusTable:
    r"""The table of what a folder holds so far; a run need not be finished.

    .. math:: \bar x = \frac{1}{n} \sum_d x_d, \qquad
              \bar x \pm t_{n-1,\,(1+c)/2}\, \frac{s}{\sqrt{n}}

    over the n documents d with a value. The records are sorted by document and added in that order,
    so the numbers are the same to the last bit whatever number of processes wrote them and however
    often they were stopped. Where queries were sampled, the noise of that is part of the spread
    between documents, and so of the interval.

    Args:
        path: the folder. confidence: of the intervals, between 0 and 1.
        interval: "t" (the mean of many documents is close to normal) or "bootstrap" (percentiles
            of 1,000 replicates over documents; for few documents or skewed values neither is
            exact).

    Raises:
        AttnbiasError: no run in the folder, a damaged journal, bad arguments.
    """
    return merged(opened(Path(path)), confidence=confidence, interval=interval)


def check_interval(confidence: float, interval: str) -> None:
    """One sentence for a confidence or an interval that cannot be."""
    number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not (number and 0 < confidence < 1):
        raise AttnbiasError(f"confidence must lie between 0 and 1, got {confidence!r}.")
    if interval not in INTERVALS:
        raise AttnbiasError(f"interval is one of {', '.join(INTERVALS)}, got {interval!r}.")


def merged(folder: Folder, *, confidence: float, interval: str) -> CorpusTable:
    """The table of a folder."""
    check_interval(confidence, interval)
    means: Means = TMeans() if interval == "t" else BootstrapMeans()
    places: dict[Cell, int] = {}
    where: dict[tuple[Cell, ...], torch.Tensor] = {}
    documents = tokens = 0
    for record in folder.records():
        if record.cells not in where:
            at = [places.setdefault(cell, len(places)) for cell in record.cells]
            where[record.cells] = torch.tensor(at, dtype=torch.long)
        values = torch.full((len(places),), math.nan, dtype=torch.float64)
        values[where[record.cells]] = torch.tensor(record.values, dtype=torch.float64)
        means.add(record.document, values)
        documents += 1
        tokens += record.tokens
    low, high = means.interval(confidence)
    columns = (means.mean, low, high, means.error)
    mean, below, above, error = (column.tolist() for column in columns)
    rows = [
        CorpusRow(*cell, mean[n], below[n], above[n], error[n], int(means.count[n]))
        for n, cell in enumerate(places)
    ]
    meta: dict[str, Any] = {
        "settings": folder.settings, "documents": documents,
        "of": folder.settings["corpus"]["documents"], "tokens": tokens, "confidence": confidence,
        "interval": interval,
    }  # fmt: skip
    return CorpusTable(rows, meta)


def each(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of a folder, one for each document measured, in the order of the corpus."""
    yield from opened(Path(path)).records()
