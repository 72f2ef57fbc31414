"""How long a run will take, from short pieces of the very text."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FIRST = 32  # tokens of the first piece
LONG = 0.5  # seconds: a piece that takes longer is the last
SPENT = 3.0  # seconds for all pieces at most, about


class Estimate:
    r"""Seconds as a function of the number of tokens, fitted to measured pieces.

    .. math:: t(n) = a + b\, n + c\, n^2, \qquad a, b, c \ge 0

    A model's forward has a part that grows with the tokens (projections, MLP), one that grows with
    their square (attention and what is measured of it) and one that does neither. Pieces of the
    text are measured, each twice as long as the one before, until one takes half a second; the
    three coefficients minimise the squared relative error over the pieces.

    Attributes:
        pieces: the (tokens, seconds) measured. coefficients: (a, b, c).
    """

    def __init__(self, pieces: Sequence[tuple[int, float]]) -> None:
        self.pieces = tuple(pieces)
        self.coefficients = _fitted(self.pieces)

    def seconds(self, tokens: int) -> float:
        """For one sequence of so many tokens."""
        a, b, c = self.coefficients
        return a + b * tokens + c * tokens * tokens

    def total(self, lengths: Sequence[int]) -> float:
        """For sequences of these lengths, one after the other."""
        return sum(self.seconds(n) for n in lengths)


def estimate(measured: Callable[[Tensor], object], ids: Tensor) -> Estimate:
    """Time `measured` on pieces of a sequence.

    Args:
        measured: what is to be timed; it gets ids ``(1, n)``. ids: ``(1, N)``, the longest text.
    """
    whole = ids.shape[1]
    measured(ids[:, : min(FIRST, whole)])  # the first call of anything is slower
    pieces: list[tuple[int, float]] = []
    size, begun = FIRST, time.perf_counter()
    while True:
        size = min(size, whole)
        pieces.append((size, min(_timed(measured, ids[:, :size]) for _ in range(2))))
        spent = time.perf_counter() - begun
        if size == whole or pieces[-1][1] > LONG or spent > SPENT:
            return Estimate(pieces)
        size *= 2


def spoken(seconds: float) -> str:
    """A length of time in words, as coarse as an estimate is."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"about {seconds / size:.2g} {unit}"
    return f"about {seconds:.2g} s" if seconds >= 1 else "less than a second"


def _timed(measured: Callable[[Tensor], object], ids: Tensor) -> float:
    begun = time.perf_counter()
    measured(ids)
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - begun


def _fitted(pieces: Sequence[tuple[int, float]]) -> tuple[float, float, float]:
    """Least squares of relative errors with coefficients of 0 or more: the best of all subsets."""
    tokens = torch.tensor([n for n, _ in pieces], dtype=torch.float64)
    seconds = torch.tensor([max(t, 1e-9) for _, t in pieces], dtype=torch.float64)
    terms = torch.stack([torch.ones_like(tokens), tokens, tokens.square()], 1) / seconds[:, None]
    best, found = float("inf"), (0.0, float((seconds / tokens).mean()), 0.0)
    for chosen in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)):
        if len(chosen) > len(pieces):
            continue
        part = terms[:, list(chosen)]
        size = part.norm(dim=0)
        answer = torch.linalg.lstsq(part / size, torch.ones_like(seconds)).solution / size
        wrong = float((part @ answer - 1).square().sum())
        if bool((answer >= 0).all()) and wrong < best - 1e-12:
            values = [0.0, 0.0, 0.0]
            for place, value in zip(chosen, answer.tolist(), strict=True):
                values[place] = value
            best, found = wrong, (values[0], values[1], values[2])
    return found
