"""What takes the place of an N x N position bias on its way from layer to layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.hub.standin import StandIn


class PositionBias(StandIn):
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

    @property
    def shape(self) -> torch.Size:
        bias = self.bias
        if bias is None:
            return torch.Size((1, 1, 1, 1))
        return torch.Size([1 if size is None else size for size in bias.shape])

    def __repr__(self) -> str:
        return f"PositionBias({self._given!r})"
