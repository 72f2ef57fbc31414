"""A subpackage that can be called: ``ab.observe(model, ...)`` next to
``attnbias.observe.statistics``.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any


def callable_room(name: str, function: Callable[..., Any]) -> None:
    """Make the module `name` callable as `function`.

    Importing a subpackage binds it on its parent, over whatever function has that name there, so
    the module itself has to answer the call.
    """

    class Room(types.ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    Room.__doc__ = function.__doc__
    sys.modules[name].__class__ = Room
