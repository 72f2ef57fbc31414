"""The kernels beside the reference in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def problem(
    n: int, m: int, heads: int, groups: int, size: int, width: int, batch: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value; scores are sharp enough that what is left out shows."""
    query, key = 2.0 * draw(batch, heads, n, size), draw(batch, groups, m, size)
    return query, key, draw(batch, groups, m, width)


def both(
    given: tuple[Tensor, Tensor, Tensor], bias: Bias | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output and log-sum-exp of the kernels, and of the reference in float64."""
    wide = [t.double() for t in given]
    out, lse = ab.attention(*given, bias=bias, lowering="triton", return_lse=True, **options)
    want, logs = ab.attention(*wide, bias=bias, lowering="reference", return_lse=True, **options)
    return out, lse, want, logs


def assert_agrees(
    given: tuple[Tensor, Tensor, Tensor],
    bias: Bias | None,
    atol: float = 2e-5,
    bare: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Both agree; without the bias (and with the options `bare` instead) they would not."""
    out, lse, want, logs = both(given, bias, **options)
    assert out.dtype == given[0].dtype
    torch.testing.assert_close(out.double(), want, atol=atol, rtol=0)
    torch.testing.assert_close(lse.double(), logs.double(), atol=atol, rtol=atol)
    if bias is not None or bare is not None:
        other = both(given, None, **(options if bare is None else bare))[2]
        assert (other - out).abs().max() > 10 * atol
    return out
