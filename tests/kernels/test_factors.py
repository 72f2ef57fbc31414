"""Factors of low rank under half-precision queries: how exact their columns are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbias as ab

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.lowering import triton_factors
from attnbias.lowering.columns import LIMITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.bfloat16, torch.float16)


def factors(rank: int, size: float, heads: int = 2) -> tuple[Tensor, Tensor]:
    """Products that cancel: the keys' numbers do not vary by as much as they are large."""
    u = size * (1 + 0.2 * torch.randn(1, heads, 37, rank, device=DEVICE))
    v = 1 + 0.2 * torch.randn(1, 1, 41, rank, device=DEVICE)
    return u, v


def product(u: Tensor, v: Tensor, kind: torch.dtype) -> tuple[Tensor, int]:
    """What the kernels add, and the number of columns."""
    found, rank = triton_factors.columns([(u, v)], kind, torch.device(DEVICE), parts=True)
    assert found is not None
    # The products of two numbers of bfloat16 are exact in float32, so are sums in float64.
    return found.left.double() @ found.right.double().mT, rank


def padded(factor: Tensor) -> Tensor:
    return torch.nn.functional.pad(factor, (0, 32 - factor.shape[-1])).double()


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_parts_err_by_no_more_than_their_bound(rank: int, parts: int) -> None:
    u, v = factors(rank, 10.0)
    want = u.double() @ v.double().mT
    found, _ = triton_factors.columns([(u, v)], torch.float32, torch.device(DEVICE), parts=True)
    assert found is not None
    assert found.left.dtype == torch.float32
    pieces = [triton_factors.split(t, torch.bfloat16, parts) for t in (u, v)]
    made = sum(
        pieces[0][a].double() @ pieces[1][b].double().mT for a, b in triton_factors.products(parts)
    )
    assert isinstance(made, Tensor)
    error = float((made - want).abs().max())
    bound = triton_factors.bound([(u, v)], parts)
    assert error <= bound
    # A bound that says something: within two orders of what happens, and one part breaks it.
    assert bound < 300 * error
    once = pieces[0][0].double() @ pieces[1][0].double().mT
    assert float((once - want).abs().max()) > 10 * bound


@pytest.mark.parametrize("kind", HALF)
def test_as_many_parts_as_the_format_needs(kind: torch.dtype) -> None:
    for size in (0.01, 1.0, 1e4):
        u, v = factors(8, size)
        parts = triton_factors.count([(u, v)], kind)
        assert parts == (2 if triton_factors.bound([(u, v)], 2) <= LIMITS[kind] else 3)
        made, rank = product(u, v, kind)
        assert rank == {2: 32, 3: 64}[parts]
        error = float((made - u.double() @ v.double().mT).abs().max())
        assert error <= triton_factors.bound([(u, v)], parts)
    assert triton_factors.count([factors(8, 0.01)], kind) == 2
    assert triton_factors.count([factors(8, 1e4)], kind) == 3
    # Three parts of two columns need no more room than two.
    assert triton_factors.count([factors(2, 0.01)], kind) == 3


def test_many_columns_stay_in_float32() -> None:
    u, v = factors(20, 1e4)
    assert triton_factors.count([(u, v)], torch.bfloat16) == 0
    made, rank = product(u, v, torch.bfloat16)
    assert rank == 32
    assert (
        torch.equal(made, u.double() @ v.double().mT)
        or float((made - u.double() @ v.double().mT).abs().max()) < 1e-6
    )


def test_what_is_known_of_factors_is_forgotten_when_they_change() -> None:
    u, v = factors(8, 0.01)
    assert triton_factors.count([(u, v)], torch.bfloat16) == 2
    with torch.no_grad():
        u.mul_(1e6)
    assert triton_factors.count([(u.detach(), v)], torch.bfloat16) == 3
    with torch.inference_mode():
        assert triton_factors.count([factors(8, 0.01)], torch.bfloat16) == 2


@pytest.mark.parametrize("kind", HALF)
@pytest.mark.parametrize("rank", [2, 5])
def test_large_factors_agree_with_the_reference(rank: int, kind: torch.dtype) -> None:
    u, v = factors(rank, 40.0)
    query, key, value = (
        torch.randn(2, h, n, 16, device=DEVICE).to(kind) for h, n in ((2, 37), (1, 41), (1, 41))
    )
    bias = ab.LowRank(u, v)
    out, lse = ab.attention(query, key, value, bias=bias, lowering="triton", return_lse=True)
    want, logs = ab.attention(
        query.double(), key.double(), value.double(), bias=bias, lowering="reference",
        return_lse=True,
    )  # fmt: skip
    # Weights and the output are rounded, the output to zero where the kernels are interpreted.
    near = 2.0**-7 if kind == torch.bfloat16 else 2.0**-10
    assert float((out.double() - want).abs().max()) < 1.5 * near * float(want.abs().max())
    # Scores reach 200: rounded to the format, they would be wrong by a half.
    assert float((lse.double() - logs.double()).abs().max()) < 2.0**-8


def test_several_factors_lie_side_by_side_in_their_order() -> None:
    one, two = factors(2, 1.0), factors(3, 1.0)
    wide = (two[0].expand(2, -1, -1, -1).contiguous(), two[1])
    found, rank = triton_factors.columns(
        [one, wide], torch.float32, torch.device(DEVICE), parts=False
    )
    assert found is not None
    assert rank == 16
    assert found.left.shape == (2, 2, 37, 16)
    assert torch.equal(found.left[..., :2], one[0].expand(2, -1, -1, -1))
    assert torch.equal(found.left[..., 2:5], wide[0])
    assert torch.equal(found.right[..., 2:5], wide[1].expand_as(found.right[..., 2:5]))
    assert not found.left[..., 5:].any()


def test_factors_without_a_column_add_nothing() -> None:
    query = torch.randn(1, 2, 5, 16, device=DEVICE)
    u, v = (torch.zeros(5, 0, device=DEVICE, requires_grad=True) for _ in range(2))
    out = ab.attention(query, query, query, bias=ab.LowRank(u, v), lowering="triton")
    assert isinstance(out, Tensor)
    want = ab.attention(query, query, query, lowering="reference")
    torch.testing.assert_close(out, want, atol=1e-5, rtol=0)
    assert [g.shape for g in torch.autograd.grad(out.sum(), [u, v])] == [u.shape, v.shape]
