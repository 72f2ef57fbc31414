"""Every structure that a kernel makes the entries of, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import attnbias as ab
from attnbias.bias import Bias
from attnbias.bias.transposed import Transposed
from attnbias.errors import Refused

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.lowering import triton_parts, triton_terms
from attnbias.lowering.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 4


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def integers(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, device=DEVICE)


def coordinates(batch: int, length: int, high: int) -> torch.Tensor:
    return integers(high, batch, length, 2)


def hidden(tensor: torch.Tensor) -> torch.Tensor:
    """With minus infinity in places."""
    return tensor.masked_fill(torch.rand_like(tensor) < 0.2, -torch.inf)


CASES: dict[str, Callable[[], Bias]] = {
    "grid": lambda: ab.GridRelative(draw(HEADS, 11, 13), (6, 7)),
    "grid, pooled keys": lambda: ab.GridRelative(draw(HEADS, 12, 14), (7, 8), (3, 4), key_stride=2),
    "grid, four keys at a time": lambda: ab.GridRelative(
        draw(HEADS, 13, 17), (6, 7), (5, 8), query_origin=1, key_origin=(2, 3), center=(6, 4)
    ),
    "grid of a batch, four keys at a time": lambda: ab.GridRelative(
        draw(2, 1, 7, 15), integers(4, 2, 37, 2), (4, 12), center=(3, 3)
    ),
    "grid of three dimensions": lambda: ab.GridRelative(draw(2, 1, 3, 5, 7), (2, 3, 4)),
    "grid, hidden": lambda: ab.GridRelative(hidden(draw(HEADS, 11, 11)), (6, 6)),
    "grid, specials": lambda: ab.GridRelative(
        draw(HEADS, 11, 13), (6, 7), specials=draw(HEADS, 3, 2)
    ),
    "grid, specials of the keys": lambda: ab.GridRelative(
        draw(1, 11, 13), (6, 7), specials=draw(2, HEADS, 1, 4)
    ),
    "places": lambda: ab.GridRelative(
        draw(HEADS, 15, 15), coordinates(2, 37, 8), coordinates(1, 41, 8)
    ),
    "places, specials": lambda: ab.GridRelative(
        draw(HEADS, 15, 15),
        coordinates(1, 36, 8),
        coordinates(2, 40, 8),
        specials=draw(HEADS, 2, 2),
    ),
    "part of a grid": lambda: ab.GridRelative(
        draw(HEADS, 11, 13), (6, 7), specials=draw(HEADS, 3, 2)
    )[..., 1:30, 3:40],
    "grid, exchanged": lambda: Transposed(
        ab.GridRelative(draw(HEADS, 11, 13), (6, 7), specials=draw(HEADS, 3, 2))
    ),
    "classes": lambda: ab.Bucketed(
        draw(2, HEADS, 5, 7), integers(5, 2, 1, 37), integers(7, 1, HEADS, 41)
    ),
    "classes of keys": lambda: ab.Bucketed(draw(1, HEADS, 37, 3), None, integers(3, 2, 1, 41)),
    "classes, hidden": lambda: ab.Bucketed(
        hidden(draw(1, HEADS, 5, 6)), integers(5, 1, 1, 37), integers(6, 1, 1, 41)
    ),
    "classes, exchanged": lambda: ab.Bucketed(
        draw(1, HEADS, 5, 7), integers(5, 2, 1, 41), integers(7, 1, HEADS, 37)
    ).transpose(),
    "neighborhood": lambda: ab.Neighborhood((6, 7), 3),
    "neighborhood, dilated": lambda: ab.Neighborhood((9, 8), (3, 4), dilation=(2, 1)),
    "neighborhood, causal": lambda: ab.Neighborhood(
        (3, 4, 5), (2, 3, 3), causal=(True, False, True)
    ),
    "neighborhood of a line": lambda: ab.Neighborhood(70, 5, dilation=3, stride=2),
    "neighborhood, exchanged": lambda: ab.Neighborhood(
        (9, 8), (3, 4), dilation=(2, 1), causal=(True, False)
    ).transpose(),
    "part of a neighborhood": lambda: ab.Neighborhood((9, 8), (3, 4), dilation=(2, 2))[
        ..., 5:44, 7:70
    ],
    "scattered segments": lambda: ab.Segments(integers(4, 2, 37), integers(5, 41) - 1),
    "large ids": lambda: ab.Segments(
        integers(3, 37) * 2**40, (integers(3, 2, 41) * 2**40).expand(2, 41)
    ),
    "matrix, hidden": lambda: ab.Dense(hidden(draw(2, 1, 37, 41))),
    "matrix of one row": lambda: ab.Dense(draw(2, HEADS, 1, 41)),
    "matrix of one column": lambda: ab.Dense(draw(1, HEADS, 37, 1)) + ab.KeyBias(draw(41)),
    "matrix, exchanged": lambda: ab.Dense(draw(1, HEADS, 41, 37).mT),
    "matrix of a mask": lambda: ab.Dense(torch.rand(2, 1, 37, 41, device=DEVICE) < 0.7),
    "two rows": lambda: (
        ab.KeyBias(hidden(draw(2, 1, 41)))
        + ab.Padding(torch.rand(2, 41, device=DEVICE) < 0.8)
        + ab.Dense(draw(1, HEADS, 1, 41))
    ),
    "two tables": lambda: (
        ab.Relative(draw(HEADS, 77), queries=37, keys=41)
        + ab.Relative(draw(2, 1, 77), queries=37, keys=41, offset=3)
    ),
    "double": lambda: (
        ab.Relative(draw(HEADS, 77).double(), queries=37, keys=41)
        + ab.KeyBias(draw(2, 1, 41).double())
        + ab.LowRank(draw(HEADS, 37, 3).double(), draw(41, 3).double())
        + ab.Dense(draw(1, 1, 37, 41).double())
    ),
    "sum of unlike ones": lambda: (
        ab.GridRelative(draw(HEADS, 11, 13), (6, 7))
        + ab.Bucketed(draw(1, HEADS, 42, 3), None, integers(3, 2, 1, 42))
        + ab.Neighborhood((6, 7), 4)
        + ab.Segments(integers(2, 2, 42), integers(2, 2, 42))
        + ab.KeyBias(draw(2, HEADS, 42))
        + ab.Relative(draw(HEADS, 83), queries=42, keys=42)
        + ab.LowRank(draw(HEADS, 42, 2), draw(2, 1, 42, 2))
        + ab.Dense(draw(1, 1, 42, 42))
        + ab.Causal(42, 42)
    ),
}


def problem(bias: Bias, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    n, m = bias.queries or 37, bias.keys or 41
    sizes = ((HEADS, n, 16), (2, m, 16), (2, m, 20))
    return tuple(torch.randn(2, *s, device=DEVICE).to(dtype) for s in sizes)


def reference(given: tuple[torch.Tensor, ...], bias: Bias | None) -> tuple[torch.Tensor, ...]:
    found = ab.attention(
        *(t.double() for t in given), bias=bias, lowering="reference", return_lse=True
    )
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    bias = CASES[name]()
    given = problem(bias)
    out, lse = ab.attention(*given, bias=bias, lowering="triton", return_lse=True)
    want, want_lse = reference(given, bias)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse.double(), atol=2e-5, rtol=1e-6)
    bare, _ = reference(given, None)
    assert (bare - out).abs().max() > 1e-2


def test_a_part_for_each_dimension_reads_the_query() -> None:
    sizes = [draw(HEADS, 5, 5, 16), draw(HEADS, 6, 6, 16)]
    bias = ab.Decomposed(sizes) * 0.25
    given = tuple(torch.randn(2, h, 30, 16, device=DEVICE) for h in (HEADS, 2, 2))
    out = ab.attention(*given, bias=bias, lowering="triton")
    want, _ = reference(given, bias)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert (reference(given, None)[0] - out).abs().max() > 1e-2


def test_few_vectors_of_distances_read_the_query() -> None:
    bias = ab.QueryRelative.clipped(draw(HEADS, 9, 16), queries=37, keys=41) * 0.25
    given = problem(bias)
    out = ab.attention(*given, bias=bias, causal=True, lowering="triton")
    want = ab.attention(*(t.double() for t in given), bias=bias, causal=True, lowering="reference")
    assert isinstance(out, torch.Tensor)
    assert isinstance(want, torch.Tensor)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert (reference(given, None)[0] - out).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("grid, four keys at a time", {"fours"}),
        ("grid, specials", {"indexed_some"}),
        ("two rows", {"row"}),
        ("two tables", {"strip"}),
        ("matrix of one row", {"row"}),
    ],
)
def test_like_structures_are_one_term(name: str, kinds: set[str]) -> None:
    bias = CASES[name]()
    given = triton_parts.give(Problem(*problem(bias), bias, 0.25), bias)
    assert set(given.kinds) == kinds
    assert len(given.kinds) == 1


def test_what_no_kernel_can_read_is_refused_with_what_to_do() -> None:
    rule = ab.MaskFunction(lambda b, h, i, j: i >= j, queries=37, keys=41)
    with pytest.raises(Refused, match="write it as Window"):
        ab.attention(*problem(rule), bias=rule, lowering="triton")
    every = ab.QueryRelative(draw(HEADS, 77, 16), queries=37, keys=41)
    with pytest.raises(Refused, match="a vector for every distance"):
        ab.attention(*problem(every), bias=every, lowering="triton")


def test_a_class_outside_of_the_table_is_an_error() -> None:
    if DEVICE == "cuda":
        pytest.skip("kernels: a device reports it at the next wait, and cannot be used after")
    bias = ab.Bucketed(draw(1, HEADS, 5, 6), integers(5, 1, 1, 37), integers(6, 1, 1, 41) + 1)
    with pytest.raises(ab.AttnbiasError, match="classes 0 to 5"):
        ab.attention(*problem(bias), bias=bias, lowering="triton")


def test_tables_of_too_many_entries_are_refused() -> None:
    bias = ab.Bucketed(
        torch.empty(1, 1, 2**15, 2**15, device="meta"),
        torch.empty(1, 1, 4, dtype=torch.long, device="meta"),
        torch.empty(1, 1, 4, dtype=torch.long, device="meta"),
    )
    assert "too large" in triton_terms.refusal(bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_queries_read_tables_in_float32(dtype: torch.dtype) -> None:
    bias = ab.GridRelative(30 + draw(HEADS, 11, 13), (6, 7)) + ab.KeyBias(draw(2, 1, 42) + 50)
    given = problem(bias, dtype)
    out = ab.attention(*given, bias=bias, lowering="triton")
    want, _ = reference(given, bias)
    assert isinstance(out, torch.Tensor)
    error = (out.double() - want).abs().max()
    # A table rounded to the format would be wrong by 2^-9 of 80 logits.
    assert error < (3e-2 if dtype == torch.bfloat16 else 4e-3)
