"""The table of an observation, and its files."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from attnbias.errors import AttnbiasError
from attnbias.observe.parquet import to_parquet

SCHEMA = "attnbias.observe/1"
COLUMNS = ("tower", "layer", "head", "statistic", "value")


class Row(NamedTuple):
    """One number: a statistic of one head. `value` is NaN where there was nothing to average.

    `error` is the standard error of the value where queries were sampled, else None.
    """

    tower: str
    layer: int
    head: int
    statistic: str
    value: float
    error: float | None = None


class Table(list[Row]):
    """The rows of an observation, ordered by tower, layer, statistic and head. ``str()`` is a text
    table."""

    meta: dict[str, Any]

    def __init__(self, rows: Iterable[Row] = (), meta: dict[str, Any] | None = None) -> None:
        super().__init__(rows)
        self.meta = dict(meta or {})

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of files: `COLUMNS`, and "error" after them where queries were sampled."""
        sampled = any(row.error is not None for row in self)
        return (*COLUMNS, "error") if sampled else COLUMNS

    def where(self, **wanted: object) -> Table:
        """The rows with the given values, as in ``table.where(statistic="entropy", layer=0)``."""
        unknown = sorted(set(wanted) - set(COLUMNS))
        if unknown:
            raise AttnbiasError(
                f"a table has the columns {', '.join(COLUMNS)}, got {', '.join(unknown)}."
            )
        rows = (r for r in self if all(getattr(r, k) == v for k, v in wanted.items()))
        return Table(rows, self.meta)

    def __str__(self) -> str:
        """One line for each layer and statistic, one column for each head; with ± its standard
        error where queries were sampled."""
        lines: dict[tuple[str, int, str], dict[int, str]] = {}
        for row in self:
            lines.setdefault((row.tower, row.layer, row.statistic), {})[row.head] = _short(row)
        heads = sorted({row.head for row in self})
        head = ["tower", "layer", "statistic", *(f"head {h}" for h in heads)]
        text = [head] + [
            [key[0], str(key[1]), key[2], *(found.get(h, "") for h in heads)]
            for key, found in lines.items()
        ]
        return aligned(text)

    def _repr_html_(self) -> str:
        """For notebooks: a table for each tower and statistic, without a script."""
        from attnbias.observe.display import heads

        grids: dict[tuple[str, str], dict[int, dict[int, float]]] = {}
        for row in self:
            grid = grids.setdefault((row.tower, row.statistic), {})
            grid.setdefault(row.layer, {})[row.head] = row.value
        return "".join(
            heads(
                f"{statistic} ({tower})",
                [
                    (str(layer), [line.get(head) for head in range(max(line) + 1)])
                    for layer, line in grid.items()
                ],
            )
            for (tower, statistic), grid in grids.items()
        )

    def to_csv(self) -> str:
        """CSV: a header line ``tower,layer,head,statistic,value``; an empty value is NaN.

        Where queries were sampled, a column ``error`` follows: the standard error of the value.
        """
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for row in self._lines():
            writer.writerow([*row[:4], *("" if math.isnan(x) else repr(x) for x in row[4:])])
        return out.getvalue()

    def _lines(self) -> Iterator[tuple[Any, ...]]:
        """The rows as `columns` says."""
        more = len(self.columns) > len(COLUMNS)
        for row in self:
            yield (*row[:5], math.nan if row.error is None else row.error) if more else row[:5]

    def to_json(self) -> str:
        """JSON: ``{"schema": "attnbias.observe/1", ..., "columns": [...], "rows": [[...], ...]}``.

        Beside the rows: `statistics` (label, name, parameters), `runs` (for each, its sites, rows
        of the batch and tokens) and `spans`; null is NaN. Where queries were sampled, `queries`
        says how many of each call, and each row has its standard error after the value.
        """
        rows = [
            [*row[:4], *(None if math.isnan(x) else x for x in row[4:])] for row in self._lines()
        ]
        payload = {"schema": SCHEMA, **self.meta, "columns": list(self.columns), "rows": rows}
        return json.dumps(payload, indent=1, allow_nan=False, default=str) + "\n"

    def to_pandas(self) -> Any:
        """A pandas DataFrame; needs pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise AttnbiasError("to_pandas() needs pandas: write pip install pandas.") from error
        return pandas.DataFrame(list(self._lines()), columns=list(self.columns))

    def to_parquet(self) -> bytes:
        """Parquet with the columns of the CSV and what the JSON holds beside the rows as metadata
        (key "attnbias"); needs pyarrow."""
        cells = list(zip(*self._lines(), strict=True)) or [()] * len(self.columns)
        named = dict(zip(self.columns, cells, strict=True))
        return to_parquet(named, {"schema": SCHEMA, **self.meta})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.csv``, ``.json`` or ``.parquet`` file, whole or not at all."""
        target = Path(path)
        kinds: dict[str, Callable[[], str | bytes]] = {
            ".csv": self.to_csv, ".json": self.to_json, ".parquet": self.to_parquet,
        }  # fmt: skip
        if target.suffix.lower() not in kinds:
            raise AttnbiasError(
                f"a table is saved as .csv or .json (or .parquet), got {target.name!r}."
            )
        _write(target, kinds[target.suffix.lower()]())


def aligned(text: list[list[str]]) -> str:
    """Lines of cells in columns; the first and third (words) to the left."""
    widths = [max(len(r[c]) for r in text) for c in range(len(text[0]))]
    left = {0, 2}
    return "\n".join(
        "  ".join(
            cell.ljust(w) if c in left else cell.rjust(w)
            for c, (cell, w) in enumerate(zip(r, widths, strict=True))
        ).rstrip()
        for r in text
    )


def _short(row: Row) -> str:
    if math.isnan(row.value):
        return "-"
    return f"{row.value:.4g}" + ("" if row.error is None else f" ± {row.error:.2g}")


def _write(target: Path, content: str | bytes) -> None:
    """A new file beside the target, then one rename."""
    if not target.parent.is_dir():
        raise AttnbiasError(f"cannot write {target}: the folder {target.parent} does not exist.")
    if target.is_dir():
        raise AttnbiasError(f"cannot write {target}: it is a folder.")
    try:
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    except OSError as error:
        raise AttnbiasError(f"cannot write {target}: {error.strerror}.") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes it private
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
