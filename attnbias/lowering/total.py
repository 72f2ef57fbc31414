"""Gradients to the stored parameters of a bias, summed over its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnbias.bias import Bias


class Total:
    """Gradients to the parameters of a bias, summed part by part.

    Parts of a bias mostly store views of what the whole stores: their gradients are added to the
    same view of the total. Where a part computes what it stores, autograd goes back.
    """

    def __init__(
        self, bias: Bias | None, parameters: Sequence[Tensor], wanted: Sequence[bool]
    ) -> None:
        self.asked = tuple(wanted)
        self.wanted = any(wanted)
        self.bias, self.leaves = bias, list(parameters)
        self.sums: list[Tensor | None] = [None] * len(self.leaves)
        if bias is None or not self.wanted:
            return
        self.leaves = [
            _own(p.detach()).requires_grad_(w) for p, w in zip(parameters, wanted, strict=True)
        ]
        self.sums = [
            torch.zeros_like(p) if w else None for p, w in zip(self.leaves, wanted, strict=True)
        ]
        with torch.enable_grad():
            self.bias = bias.with_parameters(self.leaves)

    def add(self, part: Bias, step: Tensor) -> None:
        """Pull ``ds`` of a part back; `step` may be overwritten."""
        self.take(part.parameters(), part.pull(step))

    def take(self, stored: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """Add the gradients of tensors that a part stores."""
        for place, (tensor, grad) in enumerate(zip(stored, grads, strict=True)):
            if grad is None or not tensor.requires_grad:
                continue
            view = self._view(tensor, place)
            if view is not None:
                view.add_(grad)
                continue
            found = torch.autograd.grad(
                tensor, self._open(), grad.to(tensor.dtype), retain_graph=True, allow_unused=True
            )
            rest = iter(found)
            for sums in self.sums:
                if sums is not None:
                    back = next(rest)
                    if back is not None:
                        sums.add_(back)

    def results(self) -> list[Tensor | None]:
        return list(self.sums)

    def _open(self) -> list[Tensor]:
        return [p for p, w in zip(self.leaves, self.asked, strict=True) if w]

    def _view(self, tensor: Tensor, place: int) -> Tensor | None:
        """The entries of a total that a stored tensor is a view of, if it is one."""
        if place >= len(self.leaves):
            return None
        leaf, sums = self.leaves[place], self.sums[place]
        same = tensor.untyped_storage().data_ptr() == leaf.untyped_storage().data_ptr()
        if sums is None or not same or tensor.numel() == 0 or tensor.dtype != leaf.dtype:
            return None
        if any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            return None  # one entry stands for many
        return sums.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _own(tensor: Tensor) -> Tensor:
    """Contiguous from the start of its memory, so that a view of it is a view of its gradient."""
    whole = tensor.is_contiguous() and tensor.storage_offset() == 0
    alone = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return (
        tensor.detach() if whole and alone else tensor.clone(memory_format=torch.contiguous_format)
    )
