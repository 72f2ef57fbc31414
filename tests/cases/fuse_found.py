"""The test classes of fused families, found by importing the files of `tests/fuse/`."""

from __future__ import annotations

import importlib
import pkgutil

import tests.fuse
from tests.cases.fuse import FuseCase


def files() -> list[str]:
    """Names of the test files, sorted."""
    return sorted(one.name for one in pkgutil.iter_modules(tests.fuse.__path__))


def cases() -> dict[str, type[FuseCase]]:
    """Every class that inherits the case, as "file::class"; those with a model of their own."""
    found: dict[str, type[FuseCase]] = {}
    for name in files():
        module = importlib.import_module(f"tests.fuse.{name}")
        for kind in vars(module).values():
            if not isinstance(kind, type) or not issubclass(kind, FuseCase):
                continue
            if kind.__module__ == module.__name__ and kind.__name__.startswith("Test"):
                found[f"{name}::{kind.__name__}"] = kind
    return found
