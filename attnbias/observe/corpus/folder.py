"""The folder of a corpus run: what was asked, and a journal of each process.

``run.json`` holds the settings; a run with others is refused. ``part-R.jsonl`` is written by the
process of rank R alone, one line for each document, on disk before the next document begins. What a
kill can leave is a torn last line, which is dropped; nothing is lost that was said to be done.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from attnbias.errors import AttnbiasError

SCHEMA = "attnbias.corpus/1"
HEADER = "run.json"
DOCUMENT = re.compile(rb'\{"document": (\d+), ')

Cell = tuple[str, int, int, str]  # tower, layer, head, statistic


@dataclass(frozen=True)
class Record:
    """What one document gave: a value for each cell, NaN where there was nothing to average.

    Attributes:
        document, id, tokens: index, id and length of the document.
        cells: (tower, layer, head, statistic) of each value.
        errors: standard errors of the sampling of queries, where queries were sampled.
    """

    document: int
    id: str
    tokens: int
    cells: tuple[Cell, ...]
    values: tuple[float, ...]
    errors: tuple[float, ...] | None = None


class Folder:
    """A folder of journals whose settings are known to be ours.

    Attributes:
        threads: of PyTorch, of the process that began; all others take as many, since sums of
            several threads are added in another order than those of one.
    """

    def __init__(self, path: Path, settings: dict[str, Any], threads: int) -> None:
        self.path, self.settings, self.threads = path, settings, threads
        self.key = _key(settings)

    def parts(self) -> list[Path]:
        """The journals, in a fixed order."""
        return sorted(self.path.glob("part-*.jsonl"), key=lambda p: (len(p.name), p.name))

    def index(self) -> dict[int, tuple[Path, int]]:
        """Document -> the journal and the byte where its record begins.

        A document recorded twice (two runs at once on machines that cannot see each other's locks)
        counts once: the records are the same, and the first in the order of the journals is taken.
        """
        found: dict[int, tuple[Path, int]] = {}
        for part in self.parts():
            with part.open("rb") as file:
                for start, line in _whole(part, file):
                    if match := DOCUMENT.match(line):
                        found.setdefault(int(match[1]), (part, start))
                    elif line.startswith(b'{"start": '):
                        self._belongs(part, line)
        return found

    def records(self) -> Iterator[Record]:
        """The records in the order of the documents, each once, whoever wrote them."""
        cells: dict[Path, dict[int, tuple[Cell, ...]]] = {}
        files: dict[Path, IO[bytes]] = {}
        try:
            for document, (part, start) in sorted(self.index().items()):
                if part not in files:
                    files[part] = part.open("rb")
                    cells[part] = _cells(part)
                files[part].seek(start)
                line = _loaded(part, files[part].readline())
                try:
                    own = cells[part][line["cells"]]
                    record = Record(
                        document, line["id"], line["tokens"], own, _numbers(line["values"]),
                        _numbers(line["errors"]) if "errors" in line else None,
                    )  # fmt: skip
                    fits = len(record.values) == len(own)
                except (KeyError, TypeError, ValueError):
                    fits = False
                if not fits:
                    raise _damaged(part, f"the record of document {document}")
                yield record
        finally:
            for file in files.values():
                file.close()

    def _belongs(self, part: Path, line: bytes) -> None:
        if _loaded(part, line)["start"].get("settings") != self.key:
            raise AttnbiasError(
                f"{part} belongs to a run with other settings than {self.path / HEADER}; take it "
                "out of the folder."
            )


def begin(path: Path, settings: dict[str, Any]) -> Folder:
    """The folder for a run with these settings: made, or found with the same.

    Raises:
        AttnbiasError: a folder of a run with other settings (the first that differs is named), a
            folder with something else in it, or one that cannot be written.
    """
    header = path / HEADER
    try:
        if not header.exists():
            path.mkdir(parents=True, exist_ok=True)
            strange = [found.name for found in path.iterdir() if not found.name.startswith(".")]
            if strange:
                raise AttnbiasError(
                    f"{path} holds {strange[0]!r} and no {HEADER}; name a new or empty folder."
                )
            whole = {"schema": SCHEMA, "threads": torch.get_num_threads(), "settings": settings}
            write_whole(header, json.dumps(whole, indent=1) + "\n")
        found = opened(path)
    except OSError as error:
        raise AttnbiasError(f"{path} cannot be written: {error.strerror}.") from error
    for name in sorted(settings.keys() | found.settings.keys()):
        mine, theirs = settings.get(name), found.settings.get(name)
        if mine != theirs:
            raise AttnbiasError(
                f"{path} holds a run with {name} {_short(theirs)}, and now {name} is "
                f"{_short(mine)}; give the same again, or name another folder."
            )
    return found


def opened(path: Path) -> Folder:
    """A folder that a run has made.

    Raises:
        AttnbiasError: none is there, or its header is not one of ours.
    """
    header = path / HEADER
    try:
        found = json.loads(header.read_text("utf-8"))
    except FileNotFoundError:
        raise AttnbiasError(f"{path} holds no corpus run (no {HEADER}).") from None
    except OSError as error:
        raise AttnbiasError(f"{header} cannot be read: {error.strerror}.") from error
    except ValueError:
        found = None
    parts = {} if not isinstance(found, dict) else found
    threads = parts.get("threads")
    if parts.get("schema") != SCHEMA or "settings" not in parts or not isinstance(threads, int):
        raise AttnbiasError(f"{header} is not a header of the schema {SCHEMA}.")
    return Folder(path, parts["settings"], threads)


class Journal:
    """The journal that one process adds to; nobody else may write to it meanwhile.

    Raises:
        AttnbiasError: another process is writing to it.
    """

    def __init__(self, folder: Folder, rank: int, about: dict[str, Any]) -> None:
        self.path = folder.path / f"part-{rank}.jsonl"
        self._known: dict[tuple[Cell, ...], int] = {}
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._lock()
            with self.path.open("rb") as file:
                whole = sum(len(line) for _, line in _whole(self.path, file))
            os.ftruncate(self._file, whole)  # a torn last line goes
            os.lseek(self._file, 0, os.SEEK_END)
            # Numbers of lists of cells count on from those in the file.
            self._first = len(_cells(self.path))
            self._write([{"start": {"settings": folder.key, "rank": rank, **about}}])
        except BaseException:
            os.close(self._file)
            raise

    def add(self, record: Record) -> None:
        """Write one record; it is on disk when this returns."""
        lines: list[dict[str, Any]] = []
        if record.cells not in self._known:
            self._known[record.cells] = self._first + len(self._known)
            lines.append({"cells": self._known[record.cells], "rows": record.cells})
        line: dict[str, Any] = {
            "document": record.document, "id": record.id, "tokens": record.tokens,
            "cells": self._known[record.cells], "values": _plain(record.values),
        }  # fmt: skip
        if record.errors is not None:
            line["errors"] = _plain(record.errors)
        self._write([*lines, line])

    def close(self) -> None:
        """Let go of the file; others may write to it."""
        os.close(self._file)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        data = b"".join(json.dumps(line, allow_nan=False).encode() + b"\n" for line in lines)
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on this system: the index counts a document once
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AttnbiasError(
                f"{self.path} is being written by another run; wait for it, or name another folder."
            ) from None
        except OSError:  # a file system without locks: as above
            return


def write_whole(path: Path, text: str | bytes) -> None:
    """A file that is there whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with new.open("wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _whole(path: Path, file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a journal with the byte where each begins, without a torn last one."""
    at = 0
    held: tuple[int, bytes] | None = None
    for line in file:
        if held is not None:
            if not held[1].endswith(b"}\n"):
                raise _damaged(path, f"the line at byte {held[0]}")
            yield held
        held = (at, line)
        at += len(line)
    if held is not None and held[1].endswith(b"}\n") and _is_json(held[1]):
        yield held


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _cells(part: Path) -> dict[int, tuple[Cell, ...]]:
    found: dict[int, tuple[Cell, ...]] = {}
    with part.open("rb") as file:
        for _, line in _whole(part, file):
            if line.startswith(b'{"cells": '):
                given = _loaded(part, line)
                found[given["cells"]] = tuple(
                    (str(t), int(layer), int(head), str(s)) for t, layer, head, s in given["rows"]
                )
    return found


def _loaded(part: Path, line: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except ValueError:
        raise _damaged(part, f"a line of {len(line)} bytes") from None


def _damaged(part: Path, what: str) -> AttnbiasError:
    return AttnbiasError(
        f"{part} is damaged ({what}); delete the file, and the same command measures its documents "
        "again."
    )


def _plain(values: tuple[float, ...]) -> list[float | str | None]:
    """Numbers as JSON has them: null is NaN, infinities are words."""
    return [v if math.isfinite(v) else None if math.isnan(v) else str(v) for v in values]


def _numbers(values: list[float | str | None]) -> tuple[float, ...]:
    return tuple(math.nan if v is None else float(v) for v in values)


def _key(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
