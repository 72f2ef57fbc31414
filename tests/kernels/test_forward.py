"""The forward kernel against float64, interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch

import attnbias as ab
from attnbias.bias import Bias

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(
    n: int, m: int, heads: int, groups: int, size: int, width: int
) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(2, heads, n, size, device=DEVICE),
        torch.randn(2, groups, m, size, device=DEVICE),
        torch.randn(2, groups, m, width, device=DEVICE),
    )


def biases(n: int, m: int, heads: int) -> dict[str, Bias]:
    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=DEVICE)

    return {
        "key": ab.KeyBias(draw(2, 1, m)),
        "relative": ab.Relative(draw(heads, n + m - 1), queries=n, keys=m),
        "low rank": ab.LowRank(draw(heads, n, 3), draw(1, m, 3)),
        "dense": ab.Dense(draw(1, heads, n, m)),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*biases(1, 1, 1), "sum"])
def test_agrees_with_the_reference(name: str, causal: bool) -> None:
    n, m, heads = 37, 50, 4
    query, key, value = problem(n, m, heads, 2, 20, 24)
    each = biases(n, m, heads)
    bias = sum(each.values()) if name == "sum" else each[name]
    assert isinstance(bias, Bias)
    out, lse = ab.attention(
        query, key, value, bias=bias, causal=causal, lowering="triton", return_lse=True
    )
    want, want_lse = ab.attention(
        *(t.double() for t in (query, key, value)),
        bias=bias,
        causal=causal,
        lowering="reference",
        return_lse=True,
    )
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=2e-5, rtol=0)
    bare = ab.attention(query, key, value, causal=causal)
    assert isinstance(bare, torch.Tensor)
    assert (bare - out).abs().max() > 1e-2
