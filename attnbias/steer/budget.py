"""Choosing tokens by score: exact budgets per segment, and each place once before any twice."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def shared_out(total: int, weights: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `weights`, none above its size, by largest remainder.

    Args:
        total: at most the sum of `sizes`. weights: above 0, one per segment.

    Returns:
        Whole numbers whose sum is `total`.
    """
    found = [0] * len(sizes)
    open_ = [n for n, size in enumerate(sizes) if size]
    while open_ and (left := total - sum(found)) > 0:
        base = sum(weights[n] for n in open_)
        wanted = {n: left * weights[n] / base for n in open_}
        full = [n for n in open_ if found[n] + wanted[n] >= sizes[n]]
        if full:  # what does not fit there is divided among the others anew
            for n in full:
                found[n] = sizes[n]
            open_ = [n for n in open_ if n not in full]
            continue
        for n in open_:
            found[n] += int(wanted[n])
        rest = sorted(open_, key=lambda n: (int(wanted[n]) - wanted[n], n))
        for n in rest[: total - sum(found)]:
            found[n] += 1
        break
    return found


def chosen(
    scores: Tensor, segment: Tensor, budget: Sequence[int], place: Tensor | None = None
) -> Tensor:
    """The numbers of the tokens to keep, ascending: in each segment those with the highest scores.

    Args:
        scores, segment: ``(tokens,)``. budget: how many each segment keeps.
        place: where in its frame each token stands ``(tokens,)``; then a second token of a place is
            taken only after every place of the segment has given its first, and so on. None: by
            score alone. Equal scores go to the earlier token.
    """
    order = scores.sort(descending=True, stable=True).indices
    if place is not None:
        group = segment * (int(place.max()) + 1 if place.numel() else 1) + place
        turn = _rank(group[order])
        order = order[turn.sort(stable=True).indices]
    taken = _rank(segment[order])
    limit = torch.tensor(list(budget), device=scores.device)[segment[order]]
    kept: Tensor = order[taken < limit].sort().values
    return kept


def _rank(groups: Tensor) -> Tensor:
    """How many entries of the same group stand before each."""
    by_group = groups.sort(stable=True)
    ranks = torch.arange(len(groups), device=groups.device)
    starts = torch.searchsorted(by_group.values, by_group.values)
    return torch.empty_like(ranks).index_copy_(0, by_group.indices, ranks - starts)
