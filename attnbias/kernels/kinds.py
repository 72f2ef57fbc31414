"""Kinds of terms that have constants of their own."""

from __future__ import annotations

import operator
from typing import Any


class Kind:
    """Read like the tuple that it is made of: a name and constants, ``("box", True, 1, 2)``.

    Triton takes tuples inside of constants for tuples of values and cannot hold names in them; an
    object it leaves alone. Equal, hashed and written by its parts: what is compiled is found again.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts

    def __getitem__(self, place: Any) -> Any:
        return self.parts[operator.index(place)]

    def __len__(self) -> int:
        return len(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kind) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(self.parts)

    def __repr__(self) -> str:
        return f"Kind({self.parts!r})"
