"""What is changed in a model, and its exact undoing: attributes of single modules and configs.

Nothing here is a closure: a fused model can be copied and pickled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from attnbias.fuse import modes

if TYPE_CHECKING:
    from attnbias.fuse.family import Family

MARK = "_attnbias_fused"
_ABSENT = object()


@dataclass(frozen=True)
class Mark:
    """What a module of a fused model carries while it is fused.

    Attributes:
        family: whose code computes the module's attention; None where its own does.
        original: the attention implementation that its config names outside ("" without a config).
    """

    family: Family | None
    original: str


class Method:
    """``function(module, ...)`` as an attribute of `module`; copied and pickled along with it."""

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self.function, self.module = function, module

    @modes.outside_graphs
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self.module, *args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        whole = inspect.signature(self.function)
        return whole.replace(parameters=list(whole.parameters.values())[1:])


class Door:
    """A list of changes that can be made and undone, any number of times."""

    def __init__(self) -> None:
        self._changes: list[tuple[Callable[[], Callable[[], None]]]] = []
        self._undo: list[Callable[[], None]] = []

    @property
    def is_open(self) -> bool:
        return bool(self._undo)

    def set(self, holder: Any, name: str, value: Any) -> None:
        """Plan: ``holder.name`` is `value`, on the object itself."""

        def change() -> Callable[[], None]:
            before = vars(holder).get(name, _ABSENT)
            vars(holder)[name] = value

            def back() -> None:
                if before is _ABSENT:
                    vars(holder).pop(name, None)
                else:
                    vars(holder)[name] = before

            return back

        self.change(change)

    def method(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Plan: ``module.name(...)`` is ``function(module, ...)``, a function of a module's top."""
        if name == "forward" and "_old_forward" in vars(module):
            name = "_old_forward"  # accelerate's hooks stand around the forward: stay inside them
        self.set(module, name, Method(function, module))

    def change(self, change: Callable[[], Callable[[], None]]) -> None:
        """Plan anything else: `change` makes it and returns what undoes it."""
        self._changes.append((change,))

    def open(self) -> None:
        """Make all changes; on an error those already made are undone."""
        try:
            for (change,) in self._changes:
                self._undo.append(change())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Undo all changes, the last first."""
        while self._undo:
            self._undo.pop()()
