"""See: statistics of a model's attention, streamed, one small class each."""

from __future__ import annotations

import sys
import types
from typing import Any

from attnbias.observe import statistics
from attnbias.observe.observer import observe
from attnbias.observe.seen import Labelled, Seen
from attnbias.observe.table import Row, Table

__all__ = ["Labelled", "Row", "Seen", "Table", "observe", "statistics"]


class _Room(types.ModuleType):
    """The room can be called: ``ab.observe(model, ...)`` is `attnbias.observe.observe`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return observe(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
