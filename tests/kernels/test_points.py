"""Distances in the kernels against float64: every metric, function and place where digits go."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError
from tests.kernels.compare import DEVICE, check, draw, problem

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

HEADS, N, M = 2, 37, 45
LARGER = 64 if DEVICE == "cuda" else 1  # what a GPU takes of the large cases


def rbf(heads: int = HEADS, bases: int = 5) -> ab.radial.RBF:
    return ab.radial.RBF(draw(heads, bases), draw(heads, bases).abs())


def sphere(count: int) -> Tensor:
    place = torch.rand(count, 2, device=DEVICE, dtype=torch.float64) - 0.5
    return place * torch.tensor([math.pi, 2 * math.pi], device=DEVICE)


FUNCTIONS: dict[str, Callable[[], ab.radial.RadialFunction]] = {
    "scalar": lambda: ab.radial.Scalar(draw(HEADS)),
    "squared": lambda: ab.radial.Squared(draw(HEADS)),
    "gaussian": lambda: ab.radial.Gaussian(draw(HEADS).abs() + 0.3),
    "rbf": rbf,
    "exponential": lambda: ab.radial.Exponential(draw(HEADS, 3), draw(HEADS, 3).abs()),
    "tisa": lambda: ab.radial.TISA(draw(HEADS, 2), draw(HEADS, 2).abs(), draw(HEADS, 2)),
    "rbf of all heads": lambda: ab.radial.RBF(draw(2), draw(2).abs()),
}


@pytest.mark.parametrize("metric", ["euclidean", "great_circle", "time"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_distances(name: str, metric: str) -> None:
    if metric == "great_circle":
        x, y = sphere(N), sphere(M)
    else:
        size = 1 if metric == "time" else 2
        x, y = draw(N, size), draw(M, size)
    check(ab.Distance(x, y, FUNCTIONS[name](), metric=metric))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_points_of_any_size_for_each_batch_element(size: int) -> None:
    check(ab.Distance(draw(2, N, size) / size, draw(2, M, size) / size, rbf(bases=2)))


def test_points_of_many_coordinates_are_refused() -> None:
    query, key, value = problem(N, M)
    bias = ab.Distance(draw(N, 17), draw(M, 17), ab.radial.Scalar(-1.0))
    with pytest.raises(AttnbiasError, match="at most 16 coordinates"):
        ab.attention(query, key, value, bias=bias, lowering="triton")


def test_the_future_is_hidden() -> None:
    """Some queries are before every key: they see nothing."""
    times = torch.rand(N, device=DEVICE) * 3 - 0.5
    bias = ab.Distance(times, torch.rand(M, device=DEVICE), rbf(), metric="time", causal=True)
    assert int((times < bias.y.min()).sum()) > 0
    check(bias)
    check(bias.transpose()[..., :N, :])


@pytest.mark.parametrize("name", ["squared", "exponential", "tisa"])
def test_missing_coordinates_are_hidden(name: str) -> None:
    x, y = draw(2, N, 3), draw(2, M, 3)
    x[:, 2, 1] = torch.inf
    x[1, 3] = torch.nan
    y[:, ::4, 2] = torch.nan
    y[0, 5] = -torch.inf
    check(ab.Distance(x, y, FUNCTIONS[name]()))


@pytest.mark.parametrize("shape", [(N,), (HEADS, N), (2, 1, N), (2, HEADS, N)])
def test_factors_of_queries_and_of_keys(shape: tuple[int, ...]) -> None:
    bias = ab.Distance(draw(N, 2), draw(M, 2), rbf(), weight=draw(*shape))
    check(bias)
    check(bias.transpose())


def test_the_sign_of_time_turns_round() -> None:
    bias = ab.Distance(draw(N), draw(M), ab.radial.Scalar(draw(HEADS)), metric="time")
    check(bias.transpose())


def test_space_and_time_in_one_sum() -> None:
    space = ab.Distance(draw(N, 2), draw(M, 2), rbf())
    time = ab.Distance(draw(N), draw(M), rbf(bases=3), metric="time")
    check(space + time + ab.Causal(N, M))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_formats(dtype: torch.dtype) -> None:
    check(ab.Distance(draw(N, 2), draw(M, 2), rbf()), dtype=dtype)


def test_one_query_and_slices() -> None:
    bias = ab.Distance(draw(N, 3), draw(M, 3), rbf(), weight=draw(HEADS, N))
    check(bias[..., 7:8, 3:40])


@pytest.mark.parametrize("metric", ["euclidean", "great_circle"])
def test_few_queries_whose_heads_are_rows(metric: str) -> None:
    """Decoding: rows of one tile belong to several heads, each with its own functions."""
    x, y = (sphere(3), sphere(M)) if metric == "great_circle" else (draw(3, 2), draw(M, 2))
    bias = ab.Distance(x, y, rbf(4), metric=metric, weight=draw(4, 3))
    check(bias, heads=4, groups=2)
    check(bias.transpose().transpose()[..., 2:, :], heads=4, groups=1)


def test_coordinates_in_float64_keep_their_differences() -> None:
    """A million from the origin, where float32 knows sixteenths."""
    x, y = (draw(count, 2).double() + 1e6 for count in (N, M))
    bias = ab.Distance(x, y, ab.radial.Scalar(draw(HEADS)))
    check(bias)
    rough = ab.Distance(x.float(), y.float(), bias.radial)
    assert (bias.dense() - rough.dense()).abs().max() > 1e-2


def test_close_points_on_the_sphere_keep_their_digits() -> None:
    """A few ten-millionths of the radius apart: metres on the earth."""
    x = sphere(1) * 0.9 + draw(N, 2).double() * 1e-7
    y = x[:1] + draw(M, 2).double() * 1e-7
    bias = ab.Distance(x, y, ab.radial.Scalar(draw(HEADS) * 1e7), metric="great_circle")
    assert bias.dense().abs().max() < 1e2
    check(bias)


def test_antipodes_keep_their_digits() -> None:
    x = sphere(N) * 0.9
    y = torch.stack([-x[..., 0], x[..., 1] + math.pi], -1)[torch.arange(M) % N]
    y = y + draw(M, 2).double() * 1e-3
    bells = (draw(HEADS, 1) * 3, torch.full((HEADS, 1), 1e5), torch.full((HEADS, 1), math.pi))
    radial = ab.radial.TISA(*(p.to(DEVICE) for p in bells))
    bias = ab.Distance(x, y, radial, metric="great_circle")
    assert (bias.dense().abs() > 0.1).float().mean() > 0.01
    check(bias, tolerance=1e-3)  # 1e-3 from pi, the bell magnifies what float32 knows of it


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rates = nn.Parameter(draw(HEADS))

    def forward(self, distance: Tensor) -> Tensor:
        rates = self.rates.reshape(-1, *[1] * distance.ndim)
        return torch.sin(rates * distance) * torch.exp(-0.1 * distance)


@pytest.mark.parametrize("error", [1e-3, 1e-5])
def test_any_function_by_a_table(error: float) -> None:
    bias = ab.Distance(draw(N, 2), draw(M, 2), ab.radial.Radial(Waves(), error=error)).detach()
    check(bias * 1.5, tolerance=2e-5 + 3 * error)
    check(bias[:, 1:, :, :], heads=1, tolerance=2e-5 + 2 * error)


def test_few_queries_read_tables_of_several_heads() -> None:
    bias = ab.Distance(draw(2, 2), draw(300, 2), ab.radial.Radial(Waves())).detach()
    check(bias, tolerance=3e-5)


def test_the_error_of_a_table_is_stated() -> None:
    query, key, value = problem(N, M)
    x, y = draw(N, 2), draw(M, 2)
    weight = torch.full((N,), 3.0, device=DEVICE)
    for radial, least, most in (
        (rbf(), 0.0, 0.0),
        (ab.radial.Radial(Waves(), error=1e-3), 1e-8, 3e-3),
    ):
        bias = ab.Distance(x, y, radial, weight=weight).detach()
        plan = ab.explain(query, key, value, bias=bias)
        stated = next(o.error for o in plan.offers if o.lowering == "triton")
        assert least <= stated <= most


def test_a_function_of_few_entries_is_exact() -> None:
    bias = ab.Distance(draw(5, 2), draw(7, 2), ab.radial.Radial(Waves(), error=1e-2)).detach()
    check(bias)


def test_what_no_kernel_measures_is_refused() -> None:
    query, key, value = problem(N, M)
    x, y = draw(N, 2), draw(M, 2)
    for bias, words in (
        (ab.Distance(x, y, rbf(), metric=torch.cdist), "Python function"),
        (ab.Distance(x, y, ab.radial.Radial(Waves(), error=0.0)), "table"),
        (ab.Distance(x.requires_grad_(), y, ab.radial.Radial(Waves())), "table"),
    ):
        with pytest.raises(AttnbiasError, match=words):
            ab.attention(query, key, value, bias=bias, lowering="triton")


def test_a_slice_of_a_million_points_on_a_hundred_thousand() -> None:
    """The last rows of 1,048,576 queries, keys from the middle of 100,000."""
    x, y = (torch.rand(count, 2, device=DEVICE) * 64 - 32 for count in (1_048_576, 100_000))
    bias = ab.Distance(x, y, rbf())
    check(bias[..., 1_048_550:, 60_000 : 60_000 + 300 * LARGER], size=32)


def test_weighted_squares_of_many_points() -> None:
    """A slice of 32,186 points, 8 heads of 16 features."""
    points = torch.rand(32_186, 3, device=DEVICE)
    bias = ab.Distance(points, points, ab.radial.Squared(-1.0), weight=draw(8, 32_186) ** 2)
    part = bias[..., 32_150:, 15_000 : 15_000 + 60 * LARGER]
    check(part, heads=8, groups=8, size=16)
