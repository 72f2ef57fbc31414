"""Gradients to what a `Distance` stores, summed in the kernels, against float64 autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias
from tests.kernels.compare import DEVICE, draw, problem

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

HEADS, N, M = 2, 35, 41
Build = Callable[..., Bias]


def found(
    build: Build, leaves: Sequence[Tensor], given: Sequence[Tensor], lowering: str
) -> list[Tensor]:
    """Gradients to the leaves of a loss of the output and of the log-sum-exp."""
    out, lse = ab.attention(*given[:3], bias=build(*leaves), lowering=lowering, return_lse=True)
    some = lse.isfinite()
    loss = (out * given[3].to(out.dtype)).sum() + (lse.masked_fill(~some, 0.0) * 0.7).sin().sum()
    return list(torch.autograd.grad(loss, list(leaves)))


def check(
    build: Build,
    leaves: Sequence[Tensor],
    *,
    batch: int = 1,
    n: int = N,
    m: int = M,
    twice: bool = False,
) -> None:
    """Every gradient within float32 of its own size, none of them nothing; `twice`: the same bits
    again.
    """
    given = (*problem(n, m, HEADS, 1, 16, batch), draw(batch, HEADS, n, 20))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    got = found(build, leaves, given, "triton")
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = found(build, exact, [t.double() for t in given], "reference")
    for one, two, leaf in zip(got, want, leaves, strict=True):
        assert one.dtype == leaf.dtype
        size = float(two.abs().max())
        assert size > 1e-3
        torch.testing.assert_close(one.double(), two, atol=1e-5 * size + 1e-5, rtol=1e-4)
    if twice:
        again = found(build, leaves, given, "triton")
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def fixed(n: int, m: int, size: int = 2) -> tuple[Tensor, Tensor]:
    return draw(n, size), draw(m, size)


RADIALS: dict[str, tuple[type, int, tuple[int, ...]]] = {
    "scalar": (ab.radial.Scalar, 1, (HEADS,)),
    "squared": (ab.radial.Squared, 1, (HEADS,)),
    "rbf": (ab.radial.RBF, 2, (HEADS, 5)),
    "rbf of all heads": (ab.radial.RBF, 2, (3,)),
    "exponential": (ab.radial.Exponential, 2, (HEADS, 3)),
    "tisa": (ab.radial.TISA, 3, (HEADS, 2)),
}


def drawn(name: str) -> list[Tensor]:
    _, count, shape = RADIALS[name]
    return [draw(*shape), *[draw(*shape).abs() + 0.1 for _ in range(count - 1)]]


@pytest.mark.parametrize("name", RADIALS)
def test_parameters_of_functions(name: str) -> None:
    x, y = fixed(N, M)
    check(lambda *own: ab.Distance(x, y, RADIALS[name][0](*own)), drawn(name), twice=name == "tisa")


def test_the_width_of_a_gaussian() -> None:
    x, y = fixed(N, M)
    check(lambda sigma: ab.Distance(x, y, ab.radial.Gaussian(sigma)), [draw(HEADS).abs() + 0.5])


@pytest.mark.parametrize("shape", [(N,), (HEADS, N), (2, HEADS, N)])
def test_factors_of_queries(shape: tuple[int, ...]) -> None:
    x, y = fixed(N, M)
    batch = shape[0] if len(shape) == 3 else 1
    check(
        lambda a, b, w: ab.Distance(x, y, ab.radial.RBF(a, b), weight=w),
        [*drawn("rbf"), draw(*shape)],
        batch=batch,
    )


def test_factors_of_keys_go_by_entries() -> None:
    x, y = fixed(N, M)
    check(
        lambda a, w: ab.Distance(x, y, ab.radial.Scalar(a), weight=w).transpose(),
        [*drawn("scalar"), draw(HEADS, N)],
        n=M,
        m=N,
    )


@pytest.mark.parametrize("name", ["scalar", "squared", "tisa"])
@pytest.mark.parametrize("metric", ["euclidean", "great_circle", "time"])
def test_learned_places(name: str, metric: str) -> None:
    """Some points fall together: the derivative there is zero."""
    size = {"euclidean": 3, "great_circle": 2, "time": 1}[metric]
    x, y = fixed(N, M, size)
    y[:4] = x[:4]
    check(
        lambda x, y, *own: ab.Distance(x, y, RADIALS[name][0](*own), metric=metric),
        [x, y, *drawn(name)],
    )


def test_learned_places_of_each_batch_element_with_factors() -> None:
    check(
        lambda x, y, a, b, w: ab.Distance(x, y, ab.radial.RBF(a, b), weight=w),
        [draw(2, N, 2), draw(2, M, 2), *drawn("rbf"), draw(2, 1, N)],
        batch=2,
        twice=True,
    )


def test_learned_places_in_float64() -> None:
    """A million from the origin; the gradient keeps the digits of the differences."""
    check(
        lambda x, y, a: ab.Distance(x, y, ab.radial.Scalar(a)),
        [draw(N, 2).double() + 1e6, draw(M, 2).double() + 1e6, draw(HEADS)],
    )


def test_places_of_queries_alone() -> None:
    y = draw(M, 2)
    check(lambda x: ab.Distance(x, y, ab.radial.Squared(-1.0)), [draw(N, 2)])


def test_a_transposed_bias_of_time() -> None:
    check(
        lambda x, y, a: ab.Distance(
            x, y, ab.radial.Scalar(a), metric="time", causal=True
        ).transpose(),
        [draw(N), draw(M), draw(HEADS)],
        n=M,
        m=N,
    )


def test_missing_points_and_rows_that_see_nothing() -> None:
    x, y = fixed(N, M, 3)
    x[3, 1], y[::4, 2] = torch.inf, torch.nan
    check(lambda x, y, a, b: ab.Distance(x, y, ab.radial.RBF(a, b)), [x, y, *drawn("rbf")])


def test_space_and_time_of_which_one_is_learned() -> None:
    x, y = fixed(N, M)
    time = ab.Distance(draw(N), draw(M), ab.radial.RBF(*drawn("rbf")), metric="time")
    check(
        lambda a, b, t: ab.Distance(x, y, ab.radial.RBF(a, b)) + time + ab.KeyBias(t),
        [*drawn("rbf"), draw(HEADS, M)],
    )
    check(
        lambda a, b, c: time + ab.Distance(x, y, ab.radial.TISA(a, b, c)) + ab.Causal(N, M),
        drawn("tisa"),
    )


def test_a_learned_function_goes_by_entries() -> None:
    x, y = fixed(N, M)

    def build(rates: Tensor) -> Bias:
        def function(distance: Tensor, rates: Tensor) -> Tensor:
            return torch.sin(rates.reshape(-1, *[1] * distance.ndim) * distance)

        return ab.Distance(x, y, ab.radial.Radial(function, [rates]))

    check(build, [draw(HEADS) / 2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_formats(dtype: torch.dtype) -> None:
    """Parameters are in float32 whatever the queries are."""
    x, y = fixed(N, M)
    leaves = [p.requires_grad_() for p in drawn("rbf")]
    given = [t.to(dtype) for t in (*problem(N, M, HEADS, 1, 16), draw(1, HEADS, N, 20))]

    def build(a: Tensor, b: Tensor) -> Bias:
        return ab.Distance(x, y, ab.radial.RBF(a, b))

    got = found(build, leaves, given, "triton")
    exact = [p.detach().double().requires_grad_() for p in leaves]
    want = found(build, exact, [t.double() for t in given], "reference")
    for one, two in zip(got, want, strict=True):
        assert one.dtype == torch.float32
        near = 8 * torch.finfo(dtype).eps * float(two.abs().max())
        torch.testing.assert_close(one.double(), two, atol=near, rtol=0)


def test_space_on_the_sphere_at_the_antipode() -> None:
    x = draw(N, 2) * 0.4
    y = torch.stack([-x[:, 0], x[:, 1] + math.pi], -1)[torch.arange(M, device=DEVICE) % N]
    y = y + draw(M, 2) * 0.1
    check(
        lambda x, y, a: ab.Distance(x, y, ab.radial.Squared(a), metric="great_circle"),
        [x, y, draw(HEADS)],
    )
