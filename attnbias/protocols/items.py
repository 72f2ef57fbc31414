"""The user's data: one JSON object a line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnbias.errors import AttnbiasError


@dataclass(frozen=True)
class Items:
    """The items of a file.

    Attributes:
        items: in the order of the file. sha256: of the file. folder: where it lies; pictures are
            named relative to it.
    """

    items: tuple[dict[str, Any], ...]
    sha256: str
    folder: Path
    name: str


def read(path: Path, fields: Mapping[str, str], example: str, limit: int | None = None) -> Items:
    """Read and check a file.

    Args:
        fields: name -> kind, one of "text", "texts", "number", "path"; a kind that ends in "?" may
            be left out. example: a line that would do. limit: at most so many items.

    Raises:
        AttnbiasError: a file that cannot be read, a line that is no object or lacks a field.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AttnbiasError(f"--data {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise AttnbiasError(
            f"--data {str(path)!r} is not UTF-8 text (byte {error.start}); convert it first"
        ) from error
    items: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if limit is not None and len(items) == limit:
            break
        if line.strip():
            items.append(_item(line, f"--data {str(path)!r}, line {number}", fields, example))
    if not items:
        raise AttnbiasError(f"--data {str(path)!r} holds no item; a line is such as {example}")
    return Items(tuple(items), hashlib.sha256(data).hexdigest(), path.parent, path.name)


def _item(line: str, where: str, fields: Mapping[str, str], example: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise AttnbiasError(f"{where} is no JSON: {error}; a line is such as {example}") from None
    if not isinstance(found, dict):
        raise AttnbiasError(f"{where} is no object; a line is such as {example}")
    for name, kind in fields.items():
        bare = kind.removesuffix("?")
        if name not in found:
            if bare == kind:
                raise AttnbiasError(f"{where} lacks {name!r}; a line is such as {example}")
            continue
        if not _is(found[name], bare):
            raise AttnbiasError(
                f"{where}: {name!r} must be {_WORDS[bare]}, got {found[name]!r:.60}"
            )
    return found


_WORDS = {
    "text": "a text with a word",
    "path": "the path of a file",
    "texts": "a list of texts, each with a word",
    "number": "a whole number from 0",
}


def _is(value: object, kind: str) -> bool:
    if kind == "number":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind == "texts":
        return isinstance(value, list) and bool(value) and all(_is(one, "text") for one in value)
    return isinstance(value, str) and bool(value.strip())
