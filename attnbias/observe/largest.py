"""The largest weights of each row of a map, found tile by tile."""

from __future__ import annotations

import torch
from torch import Tensor


def largest(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """``(..., count)`` each: the largest of ``weights (..., keys)``, none negative, and where.

    Largest first, of equal ones the first. Where no weight above 0 is left: 0 at -1.
    """
    found, places = [], []
    for turn in range(min(count, weights.shape[-1])):
        place = weights.argmax(-1, keepdim=True)  # names the first of equal ones
        found.append(weights.gather(-1, place))
        places.append(torch.where(found[-1] > 0, place, -1))
        if turn + 1 < count:
            weights = weights.scatter(-1, place, 0.0)
    short = (*weights.shape[:-1], count - len(found))
    found.append(weights.new_zeros(short))
    places.append(torch.full(short, -1, dtype=torch.long, device=weights.device))
    return torch.cat(found, -1), torch.cat(places, -1)


def joined(weight: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of candidates ``(..., c)``, of equal ones those of the first places."""
    order = place.argsort(dim=-1, stable=True)
    weight, place = weight.gather(-1, order), place.gather(-1, order)
    order = weight.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return weight.gather(-1, order), place.gather(-1, order)
