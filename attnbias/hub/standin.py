"""An object that travels through a model in place of an N x N tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


def _tensors(value: Any) -> Any:
    """`value` with tensors in place of the stand-ins in it."""
    if isinstance(value, StandIn):
        return value.tensor()
    if isinstance(value, (tuple, list)):
        return type(value)(_tensors(one) for one in value)
    if isinstance(value, dict):
        return {name: _tensors(one) for name, one in value.items()}
    return value


class StandIn(ABC):
    """Goes where the tensor would go; code that computes with it gets the tensor.

    What models and the hooks around their layers do to every argument leaves it as it is.
    """

    ndim = 4

    @abstractmethod
    def tensor(self) -> Tensor:
        """The tensor that it stands for."""

    def contiguous(self, *_: Any, **__: Any) -> Any:
        return self

    def to(self, *_: Any, **__: Any) -> Any:
        return self

    def dim(self) -> int:
        return 4

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*_tensors(args), **_tensors(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> Any:
        return self.tensor()[index]

    def __add__(self, other: Any) -> Any:
        return self.tensor() + other

    __radd__ = __add__
