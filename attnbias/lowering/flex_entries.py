"""The formulas of `flex_parts`: one entry of a term from its tensors and four places."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnbias.lowering import flex_points
from attnbias.lowering.flex_points import read

Kind = tuple[Any, ...]
Tensors = tuple[Tensor, ...]
Rule = Callable[..., Any] | None


def add(
    score: Tensor, kind: Kind, tensors: Tensors, b: Tensor, h: Tensor, q: Tensor, k: Tensor
) -> Tensor:
    """The score and the entry of one term; places are tensors without dimensions."""
    name = kind[0]
    if name == "turned":
        return add(score, kind[1], tensors, b, h, k, q)
    if name == "row":
        return score + read(tensors[0], kind[1], b, h, k)
    if name == "strip":
        table, start = tensors
        return score + read(table, kind[1], b, h, k - q + start[k * 0])
    if name == "whole":
        own = [one for one, there in zip((b, h, q, k), kind[1], strict=True) if there]
        return score + tensors[0][tuple(own) if own else k * 0]
    if name == "product":
        _, outer_u, outer_v, rank = kind
        for r in range(rank):
            left = read(tensors[r], outer_u, b, h, q)
            score = score + left * read(tensors[rank + r], outer_v, b, h, k)
        return score
    if name == "buckets":
        _, outer, outer_rows, outer_cols = kind
        row = q if outer_rows is None else read(tensors[1], outer_rows, b, h, q)
        return score + read(tensors[0], outer, b, h, row, read(tensors[-1], outer_cols, b, h, k))
    if name == "strips":
        strip, index, start = tensors
        return score + read(strip, kind[1], b, h, q, index[k - q + start[k * 0]])
    if name == "grid":
        return score + _grid(kind, tensors, b, h, q, k)
    return score + flex_points.entry(kind, tensors, b, h, q, k)


def _grid(kind: Kind, tensors: Tensors, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    _, outer, outer_rows, outer_cols, outer_specials = kind
    table, rows, cols, *rest = tensors
    place = read(cols, outer_cols, b, h, k) - read(rows, outer_rows, b, h, q)
    entry = read(table, outer, b, h, place)
    if outer_specials is None:
        return entry
    specials, over, left = rest
    over, left = over[k * 0], left[k * 0]
    special = read(specials, outer_specials, b, h, torch.minimum(q, over), torch.minimum(k, left))
    return torch.where((q < over) | (k < left), special, entry)


def sees(
    kind: Kind, tensors: Tensors, rule: Rule, b: Tensor, h: Tensor, q: Tensor, k: Tensor
) -> Tensor:
    """Whether a mask lets a query see a key."""
    name = kind[0]
    if name == "turned":
        return sees(kind[1], tensors, rule, b, h, k, q)
    if name == "band":
        step, seen = k - q, k >= 0
        if kind[1]:
            seen = seen & (step >= tensors[0][k * 0])
        if kind[2]:
            seen = seen & (step <= tensors[-1][k * 0])
        return seen
    if name == "keep":
        return read(tensors[0], kind[1], b, h, k) > 0
    if name == "same":
        return read(tensors[0], kind[1], b, h, q) == read(tensors[1], kind[2], b, h, k)
    if name == "near":
        seen = k >= 0
        for dim, gap in enumerate(kind[1]):
            own = tensors[3 * dim : 3 * dim + 3]
            first, last, place = (t[at] for t, at in zip(own, (q, q, k), strict=True))
            seen = seen & (place >= first) & (place <= last)
            if gap > 1:  # the remainder of a negative number is not the same everywhere
                seen = seen & (torch.remainder(torch.abs(place - first), gap) == 0)
        return seen
    assert rule is not None
    zero = k * 0
    places = [b if kind[1] else zero, h if kind[2] else zero, q, k]
    found: Tensor = rule(*[one + start[zero] for one, start in zip(places, tensors, strict=True)])
    return found
