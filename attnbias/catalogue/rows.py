"""One row of the catalogue, and how the rows are read."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from importlib import resources
from typing import Any

from attnbias.errors import AttnbiasError

# How closely the source was read; the weakest of these says "after" the work.
SOURCES = (
    "authors' code read",
    "equations read",
    "re-implementation read",
    "abstract only",
)
MARKS = ("implemented", "shown", "reproduced")


@dataclass(frozen=True)
class Work:
    """One work (paper) and what stands for it here.

    Args:
        id: the short name by which the work is called, equal to the name of its file.
        title: the work's own title.
        year: of publication.
        family: the kind of work, e.g. "bias-form".
        source: how closely it was read, one of `SOURCES`.
        objects: dotted paths of the classes and functions that carry it.
        claim: what the work claims, in one sentence.
        evidence: test files and result files of the repository, relative to its root.
        arxiv: its arXiv number, or None.
        note: what departs from the work or is left out, or "".
        marks: what was earned, a subset of `MARKS`; computed, so it never stands in the file.
    """

    id: str
    title: str
    year: int
    family: str
    source: str
    objects: tuple[str, ...]
    claim: str
    evidence: tuple[str, ...]
    arxiv: str | None = None
    note: str = ""
    marks: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in ("id", "title", "family", "claim", "objects", "evidence"):
            if not getattr(self, name):
                raise AttnbiasError(f"catalogue row {self.id!r}: {name} is empty, it must be given")
        if self.source not in SOURCES:
            raise AttnbiasError(
                f"catalogue row {self.id!r}: source is {self.source!r}, expected one of {SOURCES}"
            )

    def load(self) -> tuple[Any, ...]:
        """Import the objects and return them; AttnbiasError names the one that is not there."""
        return tuple(_resolve(path, self.id) for path in self.objects)

    def as_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(row: dict[str, Any], marks: tuple[str, ...] = ()) -> Work:
        """A row from the values of its file; AttnbiasError on a missing or unknown name."""
        names = {f.name for f in fields(Work)} - {"marks"}
        label = f"catalogue row {row.get('id')!r}"
        if unknown := sorted(set(row) - names):
            raise AttnbiasError(
                f"{label}: unknown names {unknown}, expected some of {sorted(names)}"
            )
        if missing := sorted(names - {"arxiv", "note"} - set(row)):
            raise AttnbiasError(f"{label}: the names {missing} are missing")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        return Work(**values, marks=marks)


@lru_cache(maxsize=1)
def works() -> tuple[Work, ...]:
    """Every work, in the order of year and id."""
    folder = resources.files("attnbias.catalogue")
    marks = json.loads((folder / "marks.json").read_text(encoding="utf-8"))
    found = []
    for file in (folder / "works").iterdir():
        if file.name.endswith(".json"):
            row = json.loads(file.read_text(encoding="utf-8"))
            found.append(Work.from_dict(row, tuple(marks.get(row.get("id"), ()))))
    return tuple(sorted(found, key=lambda work: (work.year, work.id)))


def work(id: str) -> Work:
    """The work of that id; AttnbiasError lists the ids when there is none."""
    for candidate in works():
        if candidate.id == id:
            return candidate
    known = ", ".join(candidate.id for candidate in works())
    raise AttnbiasError(f"no work {id!r} in the catalogue, expected one of: {known}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _resolve(path: str, id: str) -> Any:
    """The object at a dotted path: the longest importable module, then attributes."""
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue
            raise
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise AttnbiasError(f"catalogue row {id!r}: {path} is not there")
            found = getattr(found, part)
        return found
    raise AttnbiasError(f"catalogue row {id!r}: {path} is not there")
