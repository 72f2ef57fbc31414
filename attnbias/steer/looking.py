"""A rule that looks at the calls of its own branch and edits nothing there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnbias.steer.context import Editing
from attnbias.steer.edit import Active, Memory

if TYPE_CHECKING:
    from attnbias.hub import Call
    from attnbias.steer.spans import Spans


class Looking(Editing):
    """Takes part in a branch for the rule that owns it: only the rule's `look` is called.

    Attributes:
        memory: what it keeps, with ``looked``.
    """

    def __init__(self, editing: Editing, number: int, spans: Spans, name: str) -> None:
        super().__init__((), None)
        self._editing, self._number, self.spans = editing, number, spans
        self.memory = Memory(inside=name)

    def begin_forward(self, forward: int) -> None:
        self.memory.looked.clear()

    def active(self, call: Call, only: int | None = None) -> tuple[Active, ...]:
        return tuple(
            Active(item.rule, item.heads, self.spans, set(), self.memory, True)
            for item in self._editing.active(call, self._number)
            if item.rule.uses("look")
        )
