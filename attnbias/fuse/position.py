"""What takes the place of an N x N position bias on its way from layer to layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias


def _tensors(value: Any) -> Any:
    if isinstance(value, PositionBias):
        return value.tensor()
    if isinstance(value, (tuple, list)):
        return type(value)(_tensors(one) for one in value)
    if isinstance(value, dict):
        return {name: _tensors(one) for name, one in value.items()}
    return value


class PositionBias:
    """A bias that a model hands from layer to layer as it would its tensor.

    Transformers passes what `compute_bias` returned to the attention function untouched. Code that
    does compute with it gets the tensor, made once.

    Args:
        bias: the structure, or what makes it from its parameters: gradients of a layer that is
            computed again alone (reentrant checkpoints) reach the parameters only if the layer
            makes the structure itself. None for a module that has no position bias (T5's
            cross-attention, for which the stock code passes zeros).
        dtype: of the tensor that the stock code would have made.
    """

    ndim = 4

    def __init__(
        self, bias: Bias | Callable[[], Bias] | None, dtype: torch.dtype = torch.float32
    ) -> None:
        self._given, self.dtype = bias, dtype
        self._made: Bias | None = None
        self._tensor: Tensor | None = None
        self._recorded = False

    @property
    def bias(self) -> Bias | None:
        """The structure. Made anew at each call with gradients, where it is made at all."""
        if self._given is None or isinstance(self._given, Bias):
            return self._given
        if torch.is_grad_enabled():
            return self._given()
        if self._made is None:
            self._made = self._given()
        return self._made

    def tensor(self) -> Tensor:
        """The N x N tensor ``(1, heads, queries, keys)`` of the stock code."""
        if self._given is None:
            raise TypeError("this layer has no position bias, so there is no tensor of it.")
        recorded = torch.is_grad_enabled()
        if recorded and not isinstance(self._given, Bias):
            return self._given().dense().to(self.dtype)
        # Made without gradients it is of no use to a later call that needs them.
        if self._tensor is None or (recorded and not self._recorded):
            bias = self.bias
            assert bias is not None
            self._tensor, self._recorded = bias.dense().to(self.dtype), recorded
        return self._tensor

    def stock(self) -> Tensor | None:
        """What the stock attention function is to be given."""
        return None if self._given is None else self.tensor()

    # What code around layers does to all arguments, as accelerate's hooks do.

    def contiguous(self, *_: Any, **__: Any) -> PositionBias:
        return self

    def to(self, *_: Any, **__: Any) -> PositionBias:
        return self

    @property
    def shape(self) -> torch.Size:
        bias = self.bias
        if bias is None:
            return torch.Size((1, 1, 1, 1))
        return torch.Size([1 if size is None else size for size in bias.shape])

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

    def __repr__(self) -> str:
        return f"PositionBias({self._given!r})"
