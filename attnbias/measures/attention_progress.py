"""Attention progress: the share of a head's attention that lies where the answer is made from."""

from __future__ import annotations

import torch
from torch import Tensor


def progress(maps: Tensor, correct: Tensor) -> Tensor:
    r"""The share of the weight of a map that lies on chosen entries.

    .. math:: \mathrm{AP} = \frac{\sum_{(i,j) \in C} |A_{ij}|}{\sum_{ij} |A_{ij}|}

    Args:
        maps: ``(batch, heads, queries, keys)``, the rows that give answers; with a sign or not.
        correct: ``(queries, keys)`` or ``(batch, queries, keys)`` booleans.

    Returns:
        ``(batch, heads)``, 0 to 1; NaN where the whole map is zero.
    """
    chosen = correct if correct.ndim == 2 else correct[:, None]
    size = maps.double().abs()
    return (size * chosen).sum((-2, -1)) / size.sum((-2, -1))


def repetition(answers: Tensor) -> Tensor:
    """The share of equal neighbours among answers ``(batch, length)``: ``(batch,)``."""
    return (answers[:, 1:] == answers[:, :-1]).double().mean(1)


def collapse(states: Tensor) -> Tensor:
    """The mean cosine between the hidden states ``(batch, answers, size)`` of a row: ``(batch,)``.

    Over all pairs of answers but those with the first, which is learnt apart from the others.
    """
    unit = torch.nn.functional.normalize(states[:, 1:].double(), dim=-1)
    count = unit.shape[1]
    pairs = torch.ones(count, count, dtype=torch.bool, device=states.device).tril(-1)
    return (unit @ unit.mT)[:, pairs].mean(1)
