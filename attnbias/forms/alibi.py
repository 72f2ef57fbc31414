"""ALiBi: a penalty on distance, one slope per head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnbias.bias import Relative
from attnbias.errors import AttnbiasError
from attnbias.forms.lengths import distances


def alibi_slopes(heads: int) -> Tensor:
    r"""The published slopes: ``2^{-8 (h + 1) / heads}`` for a power of two; shape ``(heads,)``,
    float32.

    For another number of heads: the slopes of the power of two below it, then every second slope
    of the power of two above, as in the authors' code.
    """
    if heads < 1:
        raise AttnbiasError(f"heads must be at least 1, got {heads}.")

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / count) for h in range(count)]

    below = 2 ** int(math.log2(heads))
    slopes = geometric(below)
    if below != heads:
        slopes += geometric(2 * below)[0::2][: heads - below]
    return torch.tensor(slopes, dtype=torch.float32)


class ALiBi:
    r"""Attention with linear biases.

    .. math:: B_{hij} = -m_h\, |j - (i + \mathrm{offset})|

    With ``causal=True`` this is the published form (keys after the query are hidden anyway);
    without it it is the symmetric one.

    Source: Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables
    Input Length Extrapolation", 2022, arXiv 2108.12409, section 3; slopes for a number of
    heads that is no power of two from the authors' code.

    Args:
        heads: number of query heads.
        slopes: ``(heads,)`` to replace the published slopes; may require grad.
    """

    def __init__(self, heads: int, slopes: Tensor | None = None) -> None:
        self.heads = heads
        self.slopes = alibi_slopes(heads) if slopes is None else slopes
        if self.slopes.shape != (heads,):
            raise AttnbiasError(
                f"slopes must have shape (heads,) = ({heads},), got {tuple(self.slopes.shape)}."
            )

    def __call__(
        self,
        queries: int,
        keys: int | None = None,
        *,
        offset: int | None = None,
        device: torch.device | str | None = None,
    ) -> Relative:
        """The bias for these lengths: a `Relative` of shape ``(1, heads, queries, keys)``,
        float32.
        """
        keys = queries if keys is None else keys
        offset = keys - queries if offset is None else offset
        slopes = self.slopes.to(device) if device is not None else self.slopes
        if slopes.dtype != torch.float64:
            slopes = slopes.float()
        distance = distances(queries, keys, offset, slopes.device)
        table = -slopes[:, None] * distance.abs().to(slopes.dtype)
        return Relative(table, queries=queries, keys=keys, offset=offset)
