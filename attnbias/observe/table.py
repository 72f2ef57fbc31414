"""The table of an observation, and its files."""

from __future__ import annotations

import csv
import importlib
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from attnbias.errors import AttnbiasError

SCHEMA = "attnbias.observe/1"
COLUMNS = ("tower", "layer", "head", "statistic", "value")


class Row(NamedTuple):
    """One number: a statistic of one head. `value` is NaN where there was nothing to average."""

    tower: str
    layer: int
    head: int
    statistic: str
    value: float


class Table(list[Row]):
    """The rows of an observation, ordered by tower, layer, statistic and head. ``str()`` is a text
    table."""

    meta: dict[str, Any]

    def __init__(self, rows: Iterable[Row] = (), meta: dict[str, Any] | None = None) -> None:
        super().__init__(rows)
        self.meta = dict(meta or {})

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
        """One line for each layer and statistic, one column for each head."""
        lines: dict[tuple[str, int, str], dict[int, float]] = {}
        for row in self:
            lines.setdefault((row.tower, row.layer, row.statistic), {})[row.head] = row.value
        heads = sorted({row.head for row in self})
        head = ["tower", "layer", "statistic", *(f"head {h}" for h in heads)]
        text = [head] + [
            [key[0], str(key[1]), key[2], *(_short(found.get(h)) for h in heads)]
            for key, found in lines.items()
        ]
        return aligned(text)

    def to_csv(self) -> str:
        """CSV: a header line ``tower,layer,head,statistic,value``; an empty value is NaN."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in self:
            writer.writerow([*row[:4], "" if math.isnan(row.value) else repr(row.value)])
        return out.getvalue()

    def to_json(self) -> str:
        """JSON: ``{"schema": "attnbias.observe/1", ..., "columns": [...], "rows": [[...], ...]}``.

        Beside the rows: `statistics` (label, name, parameters), `runs` (for each, its sites, rows
        of the batch and tokens) and `spans`; null is NaN.
        """
        rows = [[*row[:4], None if math.isnan(row.value) else row.value] for row in self]
        payload = {"schema": SCHEMA, **self.meta, "columns": list(COLUMNS), "rows": rows}
        return json.dumps(payload, indent=1, allow_nan=False, default=str) + "\n"

    def to_pandas(self) -> Any:
        """A pandas DataFrame; needs pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError as error:
            raise AttnbiasError("to_pandas() needs pandas: write pip install pandas.") from error
        return pandas.DataFrame([tuple(r) for r in self], columns=list(COLUMNS))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a ``.csv`` or ``.json`` file, whole or not at all."""
        target = Path(path)
        kinds = {".csv": self.to_csv, ".json": self.to_json}
        if target.suffix.lower() not in kinds:
            raise AttnbiasError(f"a table is saved as .csv or .json, got {target.name!r}.")
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


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return "-" if math.isnan(value) else f"{value:.4g}"


def _write(target: Path, text: str) -> None:
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
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # mkstemp makes it private
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
