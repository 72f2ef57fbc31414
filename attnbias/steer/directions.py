"""Directions in hidden states: as numbers in a rule, as tensors, and by principal components."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.steer.rule import is_number


@dataclass(frozen=True)
class Direction:
    """A direction in the hidden states after one layer.

    Args:
        layer: its number inside the tower.
        vectors: one vector for every token, or one for each token in order (a vision tower whose
            inputs all have as many tokens).
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    layer: int
    vectors: tuple[tuple[float, ...], ...]


def of(value: Any, name: str) -> tuple[Direction, ...]:
    """Directions given as `Direction` records or as a mapping ``{layer: vector or tensor}``.

    Raises:
        AttnbiasError: no direction, a layer twice, vectors that are not finite or of other lengths.
    """
    items = value.items() if isinstance(value, Mapping) else value
    found = []
    for item in items if isinstance(items, Sequence) or items is not value else ():
        if isinstance(item, Direction):
            layer, vectors = item.layer, item.vectors
        elif isinstance(item, Sequence) and len(item) == 2:
            layer, vectors = item
        else:
            layer, vectors = -1, ()
        rows = torch.as_tensor(vectors, dtype=torch.float64) if len(vectors) else torch.empty(0)
        rows = rows[None] if rows.ndim == 1 else rows
        good = is_number(layer) and rows.ndim == 2 and rows.numel() and bool(rows.isfinite().all())
        if not good:
            raise AttnbiasError(
                f"{name} must go from layer numbers to vectors of finite numbers, (size) or "
                f"(tokens, size), got {type(item).__name__}."
            )
        found.append(Direction(int(layer), tuple(tuple(row) for row in rows.tolist())))
    if not found or len({one.layer for one in found}) < len(found):
        raise AttnbiasError(f"{name} must hold at least one layer, and each layer once.")
    return tuple(found)


class Table:
    """Directions as tensors, kept for each device and dtype that asked.

    Args:
        directions: one per layer. name: whose they are, for errors.
    """

    def __init__(self, directions: Sequence[Direction], name: str) -> None:
        self._name = name
        self._given = {one.layer: one.vectors for one in directions}
        self._made: dict[Any, Tensor] = {}

    def __contains__(self, layer: object) -> bool:
        return layer in self._given

    def at(self, layer: int, hidden: Tensor) -> Tensor:
        """A layer's direction ``(1 | tokens, size)`` for hidden states ``(batch, tokens, size)``.

        In float32, float64 for a float64 model.

        Raises:
            AttnbiasError: the model has another width or another number of tokens.
        """
        kind = hidden.dtype if hidden.dtype == torch.float64 else torch.float32
        place = (layer, hidden.device, kind)
        if place not in self._made:
            with torch.inference_mode(False):  # it may be used under autograd later
                made = torch.tensor(self._given[layer], dtype=kind, device=hidden.device)
            self._made[place] = made
        found = self._made[place]
        tokens, size = found.shape
        if size != hidden.shape[-1] or tokens not in (1, hidden.shape[1]):
            want = f"({hidden.shape[1]} or 1, {hidden.shape[-1]})"
            raise AttnbiasError(
                f"{self._name} has directions of shape ({tokens}, {size}) for layer {layer}, "
                f"expected {want}."
            )
        return found


def principal(rows: Tensor, rank: int, align: bool) -> Tensor:
    """The mean of rows plus the sum of their first principal components.

    Args:
        rows: ``(..., examples, size)``. rank: how many components, each of length one.
        align: turn each component to the mean's side; else its sign is such that the example with
            the largest score has a positive one.
    """
    mean = rows.mean(-2, keepdim=True)
    left, _, right = torch.linalg.svd(rows - mean, full_matrices=False)
    rank = min(rank, rows.shape[-2] - 1, rows.shape[-1])
    components = right[..., :rank, :]
    if align:
        sign = (components * mean).sum(-1, keepdim=True)
    else:
        scores = left[..., :rank]
        sign = scores.gather(-2, scores.abs().argmax(-2, keepdim=True)).mT
    components = torch.where(sign < 0, -components, components)
    return components.sum(-2) + mean.squeeze(-2)


def finite(value: object, name: str) -> None:
    """Raise `AttnbiasError` for anything but a finite number."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value):  # type: ignore[arg-type]
        raise AttnbiasError(f"{name} must be a finite number, got {value!r}.")
