"""Gradients that go through those of the entries, against float64; the tables' sums alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias
from attnbias.bias.transposed import Transposed

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.kernels.backward_launch import Work
from attnbias.kernels.indexed import table_sums
from attnbias.lowering import triton_entries, triton_parts
from attnbias.lowering.problem import Problem
from attnbias.lowering.total import Total

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS = 2


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def learned(*shape: int) -> Tensor:
    return draw(*shape).requires_grad_()


def integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, device=DEVICE)


CASES: dict[str, Callable[[], Bias]] = {
    "matrix": lambda: ab.Dense(learned(2, HEADS, 37, 41)),
    "matrix of all batch elements": lambda: ab.Dense(learned(1, HEADS, 37, 41)),
    "matrix of all heads": lambda: ab.Dense(learned(2, 1, 37, 41)),
    "matrix of one row": lambda: ab.Dense(learned(1, HEADS, 1, 41)),
    "matrix of one row a batch element": lambda: ab.Dense(learned(2, 1, 1, 41)),
    "matrix of one column": lambda: ab.Dense(learned(1, HEADS, 37, 1)) + ab.Causal(37, 41),
    "matrix, exchanged": lambda: ab.Dense(learned(1, HEADS, 41, 37).mT),
    "matrix, double": lambda: ab.Dense(draw(1, 1, 37, 41).double().requires_grad_()),
    "grid": lambda: ab.GridRelative(learned(HEADS, 11, 13), (6, 7)),
    "grid of a batch": lambda: ab.GridRelative(learned(2, 1, 11, 13), (6, 7)),
    "grid, pooled keys": lambda: ab.GridRelative(
        learned(HEADS, 12, 14), (7, 8), (3, 4), key_stride=2
    ),
    "grid, specials": lambda: ab.GridRelative(
        learned(HEADS, 11, 13), (6, 7), specials=learned(HEADS, 3, 2)
    ),
    "grid, exchanged": lambda: Transposed(
        ab.GridRelative(learned(HEADS, 11, 13), (6, 7), specials=learned(HEADS, 3, 2))
    ),
    "places": lambda: ab.GridRelative(
        learned(HEADS, 15, 15), integers(8, 2, 37, 2), integers(8, 41, 2)
    ),
    "classes": lambda: ab.Bucketed(
        learned(1, HEADS, 5, 7), integers(5, 2, 1, 37), integers(7, 1, HEADS, 41)
    ),
    "classes of keys": lambda: ab.Bucketed(learned(1, HEADS, 37, 3), None, integers(3, 2, 1, 41)),
    "classes, exchanged": lambda: ab.Bucketed(
        learned(1, HEADS, 5, 7), integers(5, 2, 1, 41), integers(7, 1, HEADS, 37)
    ).transpose(),
    "a sum": lambda: (
        ab.GridRelative(learned(HEADS, 11, 13), (6, 7))
        + ab.Dense(learned(1, HEADS, 42, 42))
        + ab.Bucketed(learned(1, HEADS, 42, 3), None, integers(3, 1, 1, 42))
        + ab.Bucketed(learned(2, 1, 42, 3), None, integers(3, 2, 1, 42))
        + ab.Neighborhood((6, 7), 4)
        + ab.Segments(integers(2, 2, 42).sort().values, integers(2, 2, 42).sort().values)
        + ab.KeyBias(draw(2, HEADS, 42))
        + ab.Relative(draw(HEADS, 83), queries=42, keys=42)
        + ab.LowRank(draw(HEADS, 42, 2), draw(2, 1, 42, 2))
    ),
}


def problem(bias: Bias, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    n, m = bias.queries or 37, bias.keys or 41
    sizes = ((HEADS, n, 16), (1, m, 16), (1, m, 20))
    return [draw(2, *s).to(dtype) for s in sizes]


def gradients(
    given: list[Tensor], bias: Bias, lowering: str, dtype: torch.dtype, **options: object
) -> list[Tensor]:
    out, lse = ab.attention(
        *(t.to(dtype) for t in given),
        bias=bias,
        lowering=lowering,
        return_lse=True,
        **options,  # type: ignore[arg-type]
    )
    seen = lse > -torch.inf
    # Not symmetric in queries and keys, and of the log-sum-exp, too.
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64)
    loss = (out.double() * weight.view_as(out)).sum() + lse[seen].double().sin().sum()
    asked = [p for p in bias.parameters() if p.requires_grad]
    return list(torch.autograd.grad(loss, asked))


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str) -> None:
    bias = CASES[name]()
    given = problem(bias)
    found = gradients(given, bias, "triton", torch.float32)
    want = gradients(given, bias, "reference", torch.float64)
    for one, two in zip(found, want, strict=True):
        assert one.dtype == two.dtype
        assert two.abs().max() > 1e-2
        torch.testing.assert_close(one.double(), two.double(), atol=3e-5, rtol=1e-4)


def test_strips_of_bounded_memory_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> Bias:
        return (
            ab.GridRelative(learned(HEADS, 13, 19), (7, 10))
            + ab.Bucketed(learned(2, HEADS, 70, 3), None, integers(3, 1, 1, 70))
            + ab.Dense(learned(2, HEADS, 70, 70))
            + ab.Window(30, 20, queries=70, keys=70)
        )

    bias = made()
    given = problem(bias)
    want = gradients(given, bias, "reference", torch.float64)
    monkeypatch.setattr(triton_entries, "ENTRIES", 2**11)
    seen: list[int] = []
    strip = triton_entries.entries.strip

    def spy(*args: object, **options: object) -> Tensor:
        found = strip(*args, **options)  # type: ignore[arg-type]
        seen.append(found.numel())
        return found

    monkeypatch.setattr(triton_entries.entries, "strip", spy)
    found = gradients(given, bias, "triton", torch.float32)
    assert len(seen) > 8
    # A stored matrix is written where it lies; a strip has at least a block of queries.
    assert sorted(seen)[-2] <= HEADS * 64 * 70
    for one, two in zip(found, want, strict=True):
        torch.testing.assert_close(one.double(), two.double(), atol=3e-5, rtol=1e-4)


def test_two_runs_give_the_same_bits() -> None:
    bias = CASES["grid"]() + ab.Dense(learned(1, HEADS, 42, 42))
    given = problem(bias)
    first = gradients(given, bias, "triton", torch.float32)
    second = gradients(given, bias, "triton", torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropped_weights_have_no_gradient() -> None:
    bias = ab.Dense(learned(1, 1, 37, 41))
    given = problem(bias)
    options = {"dropout": 0.3, "generator": None}
    torch.manual_seed(3)
    found = gradients(given, bias, "triton", torch.float32, **options)
    torch.manual_seed(3)
    want = gradients([t.double() for t in given], bias, "stream", torch.float64, **options)
    torch.testing.assert_close(found[0], want[0], atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_queries(dtype: torch.dtype) -> None:
    bias = ab.GridRelative(learned(HEADS, 11, 13), (6, 7))
    given = problem(bias, dtype)
    found = gradients(given, bias, "triton", dtype)[0]
    want = gradients(given, bias, "reference", torch.float64)[0]
    assert found.dtype == torch.float32
    error = (found - want).norm() / want.norm()
    assert error < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_the_reading_of_the_query_has_a_gradient() -> None:
    biases = (
        ab.Decomposed([learned(HEADS, 5, 5, 16), learned(HEADS, 7, 7, 16)]),
        ab.QueryRelative.clipped(learned(HEADS, 9, 16), queries=35, keys=35),
    )
    for bias in biases:
        query, key, value = (0.5 * draw(2, h, 35, 16) for h in (HEADS, 1, 1))
        query.requires_grad_()
        asked = [query, *bias.parameters()]
        steps = []
        for lowering, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            out = ab.attention(
                *(t.to(dtype) for t in (query, key, value)), bias=bias, lowering=lowering
            )
            assert isinstance(out, Tensor)
            weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)
            steps.append(torch.autograd.grad((out * weight).sum(), asked))
        for one, two in zip(*steps, strict=True):
            torch.testing.assert_close(one, two, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_sums_of_a_table(batch: int, repeated: bool) -> None:
    n, m, entries = 40, 45, 400
    ds = draw(3, 2, n, m)
    rows = integers(80, batch, n) + 20
    cols = torch.stack([torch.randperm(300, device=DEVICE)[:m] for _ in range(batch)])
    if repeated:
        cols[:, 10:20] = cols[:, :10]
    found = table_sums(ds, rows, cols, entries)
    place = (rows[:, :, None] + cols[:, None]).flatten(1)[:, None].expand(3, 2, -1)
    want = torch.zeros(3, 2, entries, dtype=torch.float64, device=DEVICE)
    want.scatter_add_(2, place, ds.double().flatten(2))
    torch.testing.assert_close(found.double(), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(found, table_sums(ds, rows, cols, entries))


@pytest.mark.parametrize("name", ["grid", "grid of a batch", "grid, specials", "places"])
def test_a_table_is_summed_the_same_on_a_device(name: str) -> None:
    bias = CASES[name]()
    assert isinstance(bias, ab.GridRelative)
    step = draw(bias.batch, bias.heads, bias.queries, bias.keys)
    found = triton_entries.pull_grid(bias, step.clone())
    for one, two in zip(found, bias.detach().pull(step), strict=True):
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-5)


def test_an_exchanged_table_is_summed_the_same_on_a_device() -> None:
    bias = CASES["grid, exchanged"]()
    assert isinstance(bias, Transposed)
    assert isinstance(bias.inner, ab.GridRelative)
    step = draw(bias.batch, bias.heads, bias.queries or 0, bias.keys or 0)
    found = triton_entries.pull_grid(bias.inner, step.mT)
    for one, two in zip(found, bias.detach().pull(step.clone()), strict=True):
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one, two, atol=2e-5, rtol=1e-5)


def test_entries_that_a_batch_shares_are_read_once_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[object, object, int]] = []
    kernel = triton_entries.entries.entries

    class Spy:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def run(*given: object, **options: object) -> None:
                seen.append((options["SHARED"], options["KINDS"], grid[0]))
                kernel[grid](*given, **options)

            return run

    monkeypatch.setattr(triton_entries.entries, "entries", Spy())
    monkeypatch.setattr(triton_entries.entries, "PROGRAMS", 1)
    bias = ab.Dense(learned(1, HEADS, 37, 41)) + ab.KeyBias(draw(2, 1, 41))
    given = problem(bias)
    found = gradients(given, bias, "triton", torch.float32)[0]
    want = gradients(given, bias, "reference", torch.float64)[0]
    ((shared, others, programs),) = seen
    assert shared == ("whole",)
    assert others == ("row",)
    rows = triton_entries.entries.config(torch.float32, 16, 20)
    assert programs == HEADS * -(-37 // rows.rows) * -(-41 // rows.cols)  # whatever the batch
    torch.testing.assert_close(found, want, atol=3e-5, rtol=1e-4)


def test_a_matrix_of_all_batch_elements_is_written_once() -> None:
    bias = ab.Dense(learned(1, HEADS, 37, 41))
    query, key, value = problem(bias)
    given = Problem(query, key, value, bias, 0.25)
    out, lse = ab.attention(
        query, key, value, bias=bias.detach(), lowering="reference", return_lse=True
    )
    total = Total(bias, bias.parameters(), [True])
    given_parts = triton_parts.give(given, bias.detach())
    work = Work.of(query, key, value, out, lse, torch.ones_like(out), None, 0.25, given_parts)
    assert triton_entries.direct(work, 0, total)
    sums = total.sums[0]
    assert sums is not None
    assert sums.abs().max() > 1e-3
