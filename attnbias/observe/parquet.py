"""Columns as a Parquet file; needs the package pyarrow (the extra "parquet")."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from attnbias.errors import AttnbiasError


def need_pyarrow() -> Any:
    """The package pyarrow.

    Raises:
        AttnbiasError: it is not installed.
    """
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise AttnbiasError(
            "a Parquet file needs the package pyarrow: write pip install 'attnbias[parquet]', or "
            "ask for CSV."
        ) from error
    return importlib.import_module("pyarrow")


def to_parquet(columns: Mapping[str, Sequence[Any]], meta: Mapping[str, Any]) -> bytes:
    """Columns of equal length as a Parquet file: words as string, whole numbers as int64, others as
    double, None as null; `meta` as JSON in the file's metadata under "attnbias"."""
    arrow = need_pyarrow()
    kinds = {str: arrow.string(), int: arrow.int64(), float: arrow.float64()}
    arrays = {}
    for name, values in columns.items():
        kind = next((type(value) for value in values if value is not None), float)
        arrays[name] = arrow.array(values, type=kinds[kind])
    table = arrow.table(arrays).replace_schema_metadata(
        {"attnbias": json.dumps(dict(meta), default=str)}
    )
    out = arrow.BufferOutputStream()
    importlib.import_module("pyarrow.parquet").write_table(table, out)
    return bytes(out.getvalue())
