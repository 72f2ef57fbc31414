"""The families that `fuse` knows: every `Family` defined in a file of this folder."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

from attnbias.errors import AttnbiasError
from attnbias.fuse.family import Family


def _found() -> list[Family]:
    families: list[Family] = []
    for entry in sorted(pkgutil.iter_modules(__path__), key=lambda one: one.name):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        for kind in vars(module).values():
            if not isinstance(kind, type) or kind.__module__ != module.__name__:
                continue
            if issubclass(kind, Family) and not inspect.isabstract(kind):
                families.append(kind())
    return families


FAMILIES: list[Family] = _found()


def register(family: Family) -> Family:
    """Let `fuse` know a family of your own modules; returns it.

    Raises:
        AttnbiasError: one of its classes is known already.
    """
    for path in family.modules:
        for other in FAMILIES:
            if path in other.modules:
                raise AttnbiasError(f"{path} is known already, as {other.name}.")
    FAMILIES.append(family)
    return family


__all__ = ["FAMILIES", "register"]
