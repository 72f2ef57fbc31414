"""The nearest bias of low rank, found anew at each call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnbias.bias import LowRank

ROUNDS = 3


class Truncation(nn.Module):
    r"""A matrix on the space of its largest singular vectors.

    .. math:: B \approx Q\,(Q^\top B), \qquad Q = \mathrm{orth}\big((B B^\top)^p B\,\Omega\big)

    Subspace iteration from fixed random numbers: O(N^2 R) for a matrix of N x N, next to the O(N^3)
    of triangle attention nothing. The same matrix gives the same factors.

    Source: Halko et al., "Finding structure with randomness: probabilistic algorithms for
    constructing approximate matrix decompositions", 2009, arXiv 0909.4061, algorithm 4.4.

    Args:
        rank: columns of the factors.
    """

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, entries: Tensor) -> LowRank:
        """``entries (1, heads, N, N)``, finite."""
        kind = entries.float() if entries.dtype != torch.float64 else entries
        n = kind.shape[-1]
        width = min(self.rank, n)
        start = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
        space = kind @ start.to(kind)
        for _ in range(ROUNDS):
            space = torch.linalg.qr(space)[0]
            space = kind @ torch.linalg.qr(kind.mT @ space)[0]
        space = torch.linalg.qr(space)[0]
        return LowRank(space, kind.mT @ space)
