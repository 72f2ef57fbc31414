"""A corpus: a file of documents, read one at a time; a bad line is named before anything runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from attnbias.errors import AttnbiasError


@dataclass(frozen=True)
class Document:
    """One document: its place in the corpus from 0, its id, its text, the line it begins at."""

    index: int
    id: str
    text: str
    line: int


@dataclass(frozen=True)
class _Place:
    """Where a document lies in the file: first byte, number of bytes, line from 1."""

    start: int
    size: int
    line: int


class Corpus:
    """Documents by index. Only their places are kept; texts are read when asked for.

    Made by `read` (a file) or `of` (texts in memory).

    Attributes:
        name: what it is called in files. digest: SHA-256 of the file's bytes (of texts in memory:
            of their JSON lines).
    """

    def __init__(
        self, name: str, digest: str, places: list[_Place], path: Path | None, data: bytes = b""
    ) -> None:
        self.name, self.digest = name, digest
        self._places, self._path, self._data = places, path, data

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Document:
        place = self._places[index]
        return _document(self.name, self._bytes(place), index, place.line, self._lines)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))

    @property
    def _lines(self) -> bool:
        return self._path is None or self._path.suffix.lower() != ".txt"

    def _bytes(self, place: _Place) -> bytes:
        if self._path is None:
            return self._data[place.start : place.start + place.size]
        with self._path.open("rb") as file:
            file.seek(place.start)
            return file.read(place.size)


def read(path: str | os.PathLike[str]) -> Corpus:
    """A corpus from a file, every line of it checked.

    ``.jsonl`` (or ``.ndjson``): one JSON object a line, ``{"text": "..."}`` or ``{"id": "...",
    "text": "..."}``; ids are words or whole numbers and differ; without one the id is the line
    number. Other keys are not read; empty lines are no documents. ``.txt``: documents parted by one
    or more empty lines, each with the number of its first line as id. UTF-8, a byte order mark at
    the beginning is allowed.

    Raises:
        AttnbiasError: no such file, another kind of file, no document; or the first line that is
            not as said above, with its number.
    """
    found = Path(path)
    if found.suffix.lower() not in (".jsonl", ".ndjson", ".txt"):
        raise AttnbiasError(
            f"corpus {found.name!r}: give a .jsonl file with lines such as "
            '{"text": "..."}, or a .txt file with an empty line between documents.'
        )
    try:
        with found.open("rb") as file:
            return _scanned(found.name, file, found)
    except OSError as error:
        raise AttnbiasError(f"corpus {str(path)!r} cannot be read: {error.strerror}.") from error


def of(texts: Iterable[str], name: str = "texts") -> Corpus:
    """A corpus of texts in memory, with the ids 1, 2, ...

    Raises:
        AttnbiasError: something that is no text, an empty text, or none at all.
    """
    if isinstance(texts, str):
        raise AttnbiasError("of(texts) takes a list of texts, got one; write of([text]).")
    lines = []
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise AttnbiasError(f"of(texts): text {index} is of type {type(text).__name__}.")
        lines.append(json.dumps({"text": text}).encode() + b"\n")
    return _scanned(name, lines, None)


def _scanned(name: str, lines: Iterable[bytes], path: Path | None) -> Corpus:
    digest = hashlib.sha256()
    places: list[_Place] = []
    plain = path is not None and path.suffix.lower() == ".txt"
    ids: dict[str, int] = {}
    at, begun = 0, None
    for number, line in enumerate(lines, 1):
        digest.update(line)
        body = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        start = at + len(line) - len(body)
        at += len(line)
        if not plain and body.strip():
            document = _document(name, body, len(places), number, True)
            if document.id in ids:
                raise AttnbiasError(
                    f"corpus {name!r}, line {number}: the id {document.id!r} is that of line "
                    f"{ids[document.id]} too; give each document its own."
                )
            ids[document.id] = number
            places.append(_Place(start, len(body), number))
        elif plain and body.strip():
            begun = _Place(start, 0, number) if begun is None else begun
            begun = _Place(begun.start, at - begun.start, begun.line)
            _decoded(name, body, number)
        elif begun is not None:
            places.append(begun)
            begun = None
    if begun is not None:
        places.append(begun)
    if not places:
        raise AttnbiasError(f"corpus {name!r} holds no document; give at least one.")
    data = b"".join(lines) if path is None else b""
    return Corpus(name, digest.hexdigest(), places, path, data)


def _document(name: str, data: bytes, index: int, line: int, json_lines: bool) -> Document:
    where = f"corpus {name!r}, line {line}"
    text = _decoded(name, data, line)
    if not json_lines:
        return Document(index, str(line), text.strip("\r\n"), line)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise AttnbiasError(f"{where} is not JSON: {error}.") from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise AttnbiasError(f'{where}: write a JSON object with a text, {{"text": "..."}}.')
    if not found["text"].strip():
        raise AttnbiasError(f"{where}: the text holds no word; leave the line out.")
    called = found.get("id", line)
    if not isinstance(called, (str, int)) or isinstance(called, bool) or called == "":
        raise AttnbiasError(f'{where}: "id" is a word or a whole number, got {called!r}.')
    for word in (str(called), found["text"]):
        if any("\ud800" <= sign <= "\udfff" for sign in word):
            raise AttnbiasError(f"{where}: half of a surrogate pair is no text; mend the line.")
    return Document(index, str(called), found["text"], line)


def _decoded(name: str, data: bytes, line: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise AttnbiasError(
            f"corpus {name!r}, line {line} is not UTF-8 text (byte {error.start} of it)."
        ) from None
