"""Files are written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from attnbias.errors import AttnbiasError
from attnbias.report.data import ReportData


def check_targets(paths: Iterable[Path]) -> None:
    """Refuse, before any work, files that could not be written or would overwrite each other.

    Raises:
        AttnbiasError: a folder is missing or may not be written to, the path is a folder, or two
            outputs name one file.
    """
    seen: set[Path] = set()
    for path in paths:
        folder = path.parent
        if not folder.is_dir():
            raise AttnbiasError(f"{path}: the folder {folder} does not exist; make it first")
        if path.is_dir():
            raise AttnbiasError(f"{path}: is a folder; name a file")
        if not os.access(folder, os.W_OK):
            raise AttnbiasError(f"{path}: the folder {folder} may not be written to")
        if path.resolve() in seen:
            raise AttnbiasError(f"{path}: named for two outputs; name a file for each")
        seen.add(path.resolve())


def write_all(contents: dict[Path, bytes]) -> None:
    """Write every file under a temporary name beside its place, then move all into place.

    Nothing is moved unless everything could be written; a failure leaves no temporary file behind.
    """
    check_targets(contents)
    staged: list[tuple[str, Path]] = []
    try:
        for path, content in contents.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.")
            staged.append((name, path))
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(name, 0o666 & ~_umask())
        while staged:
            name, path = staged[0]
            os.replace(name, path)
            staged.pop(0)
    except OSError as error:
        where = staged[-1][1] if staged else "output"
        raise AttnbiasError(f"{where}: could not be written ({error.strerror})") from error
    finally:
        for name, _ in staged:
            Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


CSV_COLUMNS = (
    "statistic", "unit", "tower", "layer", "head", "value", "shuffled", "random", "even", "low",
    "high",
)  # fmt: skip


def to_csv(data: ReportData) -> bytes:
    """A row for each statistic, tower, layer, head: value, interval, two controls, even value."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for one in data.maps:
        for layer, number, *rest in one.cells():
            values = ["" if math.isnan(x) else repr(x) for x in rest]
            writer.writerow([one.statistic, one.unit, one.tower, layer, number, *values])
    return out.getvalue().encode()


def to_json(data: ReportData) -> bytes:
    """The whole of `data` in the schema of `ReportData.from_dict`, null where nothing was measured;
    one line for each map, word and profile."""
    whole = data.as_dict()
    parts = []
    for name, value in whole.items():
        text = json.dumps(value, allow_nan=False)
        if name in ("maps", "words", "profiles"):
            lines = ",\n  ".join(json.dumps(one, allow_nan=False) for one in value)
            text = f"[\n  {lines}\n ]"
        parts.append(f" {json.dumps(name)}: {text}")
    return ("{\n" + ",\n".join(parts) + "\n}\n").encode()
