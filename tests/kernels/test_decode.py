"""Few queries: keys split over programs and joined, heads that share keys in one tile."""

from __future__ import annotations

import pytest
import torch

import attnbias as ab

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.kernels import decode, ranges
from attnbias.kernels.launch import Given
from tests.kernels.parity import DEVICE, assert_agrees, both, draw, problem


@pytest.mark.parametrize("n", [1, 3, 16])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (8, 1)])
def test_grouped_heads(n: int, heads: int, groups: int) -> None:
    m = 500
    bias = ab.Relative(draw(heads, n + m - 1), queries=n, keys=m) + ab.KeyBias(draw(heads, m))
    assert_agrees(problem(n, m, heads, groups, 20, 24), bias, causal=True)


@pytest.mark.parametrize("m", [1, 31, 64, 65, 333])
def test_lengths(m: int) -> None:
    out, lse, want, logs = both(problem(1, m, 4, 2, 16, 16), None)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), logs.double(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("shared", [False, True])
def test_factors(shared: bool) -> None:
    n, m, heads = 2, 300, 4
    bias = ab.LowRank(draw(heads, n, 3), draw(1 if shared else heads, m, 3))
    assert_agrees(problem(n, m, heads, 2, 16, 16), bias)


@pytest.mark.parametrize("size", [64, 96, 192])
def test_head_sizes(size: int) -> None:
    bias = ab.Dense(draw(1, 4, 1, 200))
    assert_agrees(problem(1, 200, 4, 1, size, size), bias)


def test_windows_paddings_and_segments() -> None:
    n, m = 4, 400
    given = problem(n, m, 4, 2, 16, 16)
    assert_agrees(given, ab.Window(150, None, queries=n, keys=m))
    keep = torch.arange(m, device=DEVICE)[None] < torch.tensor([[400], [90]], device=DEVICE)
    assert_agrees(given, ab.Padding(keep), causal=True)
    ids = (torch.arange(m, device=DEVICE) // 100)[None]
    wanted = torch.tensor([[0, 1, 3, 9]], device=DEVICE)
    out = assert_agrees(given, ab.Segments(wanted, ids))
    assert bool((out[:, :, 3] == 0).all()), "no key has that id"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    given = tuple(t.to(dtype) for t in problem(1, 600, 8, 2, 64, 64))
    atol = 4e-3 if dtype == torch.float16 else 3e-2
    assert_agrees(given, ab.KeyBias(4 * draw(8, 600)), atol=atol)  # type: ignore[arg-type]


def test_dropout() -> None:
    given = problem(2, 300, 4, 2, 16, 16)
    found = [
        ab.attention(
            *given, bias=ab.KeyBias(draw(300) * 0), dropout=0.5, lowering=name,
            generator=torch.Generator().manual_seed(3),
        )
        for name in ("triton", "stream")
    ]  # fmt: skip
    torch.testing.assert_close(*found, atol=2e-5, rtol=0)


def test_how_keys_are_split() -> None:
    places, band, ranged = ranges.places((None, None), None, 1, 1000)
    given = Given((), (), None, 0, places, band, ranged, None)
    query, key, _ = problem(1, 1000, 8, 2, 16, 16)
    found = decode.few(query, key, given)
    assert found is not None
    assert found.together == 4
    assert found.parts > 1
    assert decode.few(draw(1, 1, 65, 16), draw(1, 1, 1000, 16), given) is None
