"""Comparing a kernel with float64: what the tests of distances share."""

from __future__ import annotations

import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def problem(
    n: int, m: int, heads: int = 2, groups: int = 1, size: int = 20, batch: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; values are wider by four."""
    return (
        draw(batch, heads, n, size),
        draw(batch, groups, m, size),
        draw(batch, groups, m, size + 4),
    )


def check(
    bias: Bias,
    *,
    heads: int = 2,
    groups: int = 1,
    size: int = 20,
    dtype: torch.dtype = torch.float32,
    tolerance: float = 2e-5,
) -> None:
    """Output and log-sum-exp against the reference; without the bias they would fail."""
    assert bias.queries is not None
    assert bias.keys is not None
    shape = (bias.queries, bias.keys, heads, groups, size, bias.batch)
    given = [t.to(dtype) for t in problem(*shape)]
    out, lse = ab.attention(*given, bias=bias, lowering="triton", return_lse=True)
    want, want_lse = ab.attention(
        *(t.double() for t in given), bias=bias, lowering="reference", return_lse=True
    )
    eps = torch.finfo(dtype).eps
    near = tolerance if dtype == torch.float32 else 4 * eps
    torch.testing.assert_close(out.double(), want, atol=near, rtol=near)
    torch.testing.assert_close(
        lse.double(), want_lse.double(), atol=max(tolerance, 1e-3 * (eps > 1e-6)), rtol=1e-6
    )
    bare = ab.attention(*given)
    assert isinstance(bare, Tensor)
    assert (bare - out).abs().max() > 5 * near
