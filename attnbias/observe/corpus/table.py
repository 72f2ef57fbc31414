"""The table of a corpus: for each head and statistic the mean over the documents."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from attnbias.errors import AttnbiasError
from attnbias.observe.corpus.folder import SCHEMA, write_whole
from attnbias.observe.parquet import to_parquet


class CorpusRow(NamedTuple):
    """One statistic of one head over a corpus.

    Attributes:
        tower, layer, head, statistic: as in the table of `observe`.
        mean: over the documents, each counting the same whatever its length; the value of one
            document is what `observe` gives for it alone.
        low, high: ends of the confidence interval of that mean. error: its standard error. The
            documents are the unit: both say how the mean would vary with other documents of the
            same kind, and NaN where fewer than two documents have a value.
        documents: how many documents have a value.
    """

    tower: str
    layer: int
    head: int
    statistic: str
    mean: float
    low: float
    high: float
    error: float
    documents: int


COLUMNS = CorpusRow._fields


class CorpusTable(list[CorpusRow]):
    """The rows of a corpus run, ordered as the first document has them.

    Attributes:
        meta: the settings of the run, `documents` (how many were measured), `of` (how many the
            corpus has), `tokens`, `confidence` and `interval` ("t" or "bootstrap").
    """

    meta: dict[str, Any]

    def __init__(self, rows: Iterable[CorpusRow] = (), meta: dict[str, Any] | None = None) -> None:
        super().__init__(rows)
        self.meta = dict(meta or {})

    @property
    def complete(self) -> bool:
        """Whether every document of the corpus has been measured."""
        return bool(self.meta.get("documents") == self.meta.get("of"))

    def where(self, **wanted: object) -> CorpusTable:
        """The rows with the given values, as in ``table.where(statistic="entropy", layer=0)``."""
        unknown = sorted(set(wanted) - set(COLUMNS))
        if unknown:
            raise AttnbiasError(
                f"a corpus table has the columns {', '.join(COLUMNS)}, got {', '.join(unknown)}."
            )
        rows = (r for r in self if all(getattr(r, k) == v for k, v in wanted.items()))
        return CorpusTable(rows, self.meta)

    def __str__(self) -> str:
        """The first line says over what; then a line for each layer and statistic: mean ± half the
        width of the interval, for each head."""
        from attnbias.observe.table import aligned

        lines: dict[tuple[str, int, str], dict[int, str]] = {}
        for row in self:
            lines.setdefault((row.tower, row.layer, row.statistic), {})[row.head] = _short(row)
        heads = sorted({row.head for row in self})
        text = [["tower", "layer", "statistic", *(f"head {h}" for h in heads)]]
        text += [
            [key[0], str(key[1]), key[2], *(found.get(h, "") for h in heads)]
            for key, found in lines.items()
        ]
        return f"{self._says()}\n{aligned(text)}"

    def _says(self) -> str:
        share = f"{100 * self.meta.get('confidence', 0.95):g}%"
        done, of = self.meta.get("documents", 0), self.meta.get("of", 0)
        part = "" if done == of else f" of {of}"
        return f"mean over {done}{part} documents ± half of its {share} interval"

    def to_csv(self) -> str:
        """CSV with a header line; an empty number is NaN."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self:
            numbers = ["" if math.isnan(x) else repr(x) for x in row[4:8]]
            writer.writerow([*row[:4], *numbers, row.documents])
        return out.getvalue()

    def to_json(self) -> str:
        """JSON: ``{"schema": "attnbias.corpus/1", ..., "columns": [...], "rows": [[...], ...]}``;
        null is NaN."""
        rows = [
            [*r[:4], *(x if math.isfinite(x) else None for x in r[4:8]), r.documents] for r in self
        ]
        payload = {"schema": SCHEMA, **self.meta, "columns": list(COLUMNS), "rows": rows}
        return json.dumps(payload, indent=1, allow_nan=False) + "\n"

    def to_parquet(self) -> bytes:
        """Parquet with the same columns and `meta` as metadata; needs pyarrow. NaN is NaN."""
        columns = {name: [getattr(row, name) for row in self] for name in COLUMNS}
        return to_parquet(columns, {"schema": SCHEMA, **self.meta})

    def to_pandas(self) -> Any:
        """A pandas DataFrame; needs pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise AttnbiasError("to_pandas() needs pandas: write pip install pandas.") from error
        return pandas.DataFrame([tuple(r) for r in self], columns=list(COLUMNS))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.csv``, ``.json`` or ``.parquet`` file, whole or not at all."""
        target = Path(path)
        kinds = {".csv": self.to_csv, ".json": self.to_json, ".parquet": self.to_parquet}
        if target.suffix.lower() not in kinds:
            raise AttnbiasError(
                f"a table is saved as .csv, .json or .parquet, got {target.name!r}."
            )
        content = kinds[target.suffix.lower()]()
        try:
            write_whole(target, content)  # type: ignore[arg-type]
        except OSError as error:
            raise AttnbiasError(f"cannot write {target}: {error.strerror}.") from error


def _short(row: CorpusRow) -> str:
    if math.isnan(row.mean):
        return "-"
    reach = (row.high - row.low) / 2
    return f"{row.mean:.4g}" if math.isnan(reach) else f"{row.mean:.4g} ± {reach:.2g}"
