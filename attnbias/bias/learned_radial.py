"""Any function of the distance, given or learned, and its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.bias.base import length, narrow, stored
from attnbias.bias.radial import RadialFunction
from attnbias.bias.table import Table, tabulate
from attnbias.errors import AttnbiasError


class Radial(RadialFunction):
    r"""Any function of the distance: ``f(d)[h]``, given or learned.

    `function` takes distances of any shape and returns values of shape ``(heads, *shape)``:

    - an `nn.Module`: its parameters are those of the bias, gradients reach them;
    - a function called as ``function(distances, *parameters)`` with the tensors `parameters`;
    - a function of the distances alone, which is fixed: tensors that it holds must not require
      gradients, nor change while the bias lives.

    With the compiled loops a function that is smooth enough is read from a table: linear between
    nodes over the range of distances that occur, refined until the largest difference to the
    function, measured between the nodes and doubled, is at most `error`. Its gradients are those of
    the tabulated function. Elsewhere (plain PyTorch, float64, gradients to coordinates, a function
    that a table of 32,768 nodes does not follow) it is evaluated exactly, tile by tile.

    Args:
        function: as above.
        parameters: tensors handed to `function` and trained; not with a module.
        error: largest error of an entry by the table (before the weight of a query), 0.0 for no
            table.

    Raises:
        AttnbiasError: values of another shape; a gradient that would be lost.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        parameters: Sequence[Tensor] = (),
        *,
        error: float = 1e-5,
    ) -> None:
        if not callable(function):
            raise AttnbiasError(f"Radial takes a function, got {type(function).__name__}.")
        self.function, self.error = function, error
        self._names: tuple[str, ...] | None = None
        if isinstance(function, nn.Module):
            if parameters:
                raise AttnbiasError("Radial takes its parameters from the module or from a list.")
            named = dict(function.named_parameters())
            self._names, parameters = tuple(named), tuple(named.values())
        self._own = tuple(stored(p, "Radial parameter") for p in parameters)
        self._factor: float | Tensor = 1.0  # or (heads,)
        self._memo: dict[str, Any] = {}  # the last table, one for all selections
        self._part: slice | None = None
        with torch.enable_grad():
            values = self._call(torch.zeros(2, dtype=self.dtype, device=self._device))
        if values.requires_grad and not any(p.requires_grad for p in self._own):
            raise AttnbiasError(
                "the function of a Radial depends on tensors that require gradients and are not "
                "among its parameters: give the module itself, or function(distances, *parameters) "
                "with parameters=[...]."
            )
        self._all_heads = values.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """In which the function is evaluated."""
        return self._own[0].dtype if self._own else torch.get_default_dtype()

    @property
    def _device(self) -> torch.device | None:
        return self._own[0].device if self._own else None

    @property
    def heads(self) -> int:
        if self._part is None:
            return self._all_heads
        return length(self._part)

    def _call(self, distances: Tensor) -> Tensor:
        """``(all heads, *shape)`` before the factor."""
        if self._names is not None:
            assert isinstance(self.function, nn.Module)
            given = dict(zip(self._names, self._own, strict=True))
            values = torch.func.functional_call(self.function, given, (distances,))
        else:
            values = self.function(distances, *self._own)
        if not isinstance(values, Tensor) or values.shape[1:] != distances.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise AttnbiasError(
                "the function of a Radial must return (heads, *shape) for distances of a shape, "
                f"got {got} for {tuple(distances.shape)}."
            )
        return values

    def _whole(self, distances: Tensor) -> Tensor:
        """``(all heads, *shape)``, factor done."""
        values = self._call(distances.to(self.dtype) if self._own else distances)
        if isinstance(self._factor, Tensor):
            return values * self._factor.reshape((-1,) + (1,) * distances.ndim)
        return values * self._factor

    def _selected(self, values: Tensor) -> Tensor:
        return values if self._part is None else narrow(values, 0, self._part)

    def __call__(self, distance: Tensor) -> Tensor:
        return self._selected(self._whole(distance[:, 0])).movedim(0, 1)

    def parameters(self) -> tuple[Tensor, ...]:
        return (*self._own, *([self._factor] if isinstance(self._factor, Tensor) else []))

    def _copy(self) -> Radial:
        made: Radial = object.__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def rebuild(self, parameters: Iterator[Tensor]) -> Radial:
        made = self._copy()
        made._own = tuple(next(parameters) for _ in self._own)
        if isinstance(self._factor, Tensor):
            made._factor = next(parameters)
        return made

    def select(self, heads: slice) -> Radial:
        if self.heads == 1:
            return self
        made, start = self._copy(), 0 if self._part is None else self._part.start
        made._part = slice(start + heads.start, start + heads.stop)
        return made

    def scaled(self, factor: float | Tensor) -> Radial:
        made = self._copy()
        made._memo = {}
        if isinstance(factor, Tensor):
            factor = factor.reshape(-1)
            if self._part is not None and factor.shape[0] > 1:  # the other heads stay as they are
                rest = (self._part.start, self._all_heads - self._part.stop)
                factor = torch.cat([factor.new_ones(rest[0]), factor, factor.new_ones(rest[1])])
            made._all_heads = max(self._all_heads, factor.shape[0])
        made._factor = self._factor * factor
        return made

    def table(self, low: float, high: float) -> Table | None:
        """The table over a range of distances, or None where none is good enough.

        Kept until a parameter or the range changes (a change that PyTorch does not count, such as
        one through ``parameter.data``, is not seen).
        """
        if self.error <= 0 or self.dtype != torch.float32:
            return None
        # The tensors are kept with their counts of changes: their memory cannot be another's.
        own = self.parameters()
        key = (low, high)
        marks = [(p.data_ptr(), p.shape, -1 if p.is_inference() else p._version) for p in own]
        if self._memo.get("key") != (key, marks):
            made = tabulate(self._whole, low, high, self.error, self.dtype, self._device)
            self._memo.update(key=(key, marks), table=made, alive=[p.detach() for p in own])
        table: Table | None = self._memo["table"]
        if table is None or self._part is None:
            return table
        return dataclasses.replace(table, values=self._selected(table.values))

    def pull_table(self, nodes: Tensor, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients to `parameters` from those to the values at the nodes ``(heads, nodes)``."""
        own = self.parameters()
        if not own:
            return ()
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in own]
            part = self.rebuild(iter(leaves))
            values = part._selected(part._whole(nodes))
        return torch.autograd.grad(values, leaves, grad.to(values.dtype), allow_unused=True)
