"""Gradients of the kernels against float64, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.kernels import backward_configs, backward_launch
from attnbias.kernels.backward import Lines
from attnbias.kernels.backward_rows import rows_of_blocks
from attnbias.kernels.configs import Config
from attnbias.kernels.launch import Given
from attnbias.kernels.places import Places
from tests.kernels.gradients import DEVICE, assert_gradients, draw, gradients, problem

N, M, HEADS = 37, 41, 2


def relative(table: Tensor, n: int = N, m: int = M) -> Bias:
    return ab.Relative(table, queries=n, keys=m)


STRUCTURES: dict[str, tuple[Callable[..., Bias], list[tuple[int, ...]]]] = {
    "key": (ab.KeyBias, [(1, HEADS, M)]),
    "relative": (relative, [(HEADS, N + M - 1)]),
    "low rank": (ab.LowRank, [(HEADS, N, 3), (1, M, 3)]),
    "sum": (
        lambda row, table, u, v, w, x: (
            ab.KeyBias(row) + relative(table) + ab.LowRank(u, v) + ab.LowRank(w, x)
        ),
        [(1, M), (HEADS, N + M - 1), (HEADS, N, 3), (HEADS, M, 3), (1, N, 2), (HEADS, M, 2)],
    ),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_every_gradient(name: str, causal: bool) -> None:
    make, shapes = STRUCTURES[name]
    assert_gradients(problem(N, M), make, [draw(*s) for s in shapes], causal=causal)


@pytest.mark.parametrize(
    "bias",
    [
        pytest.param(lambda: ab.Window(5, 3, queries=N, keys=M), id="window"),
        pytest.param(lambda: ab.Padding(torch.arange(M) < 29), id="padding"),
        pytest.param(lambda: ab.Padding(torch.arange(M) % 3 > 0), id="padding with gaps"),
        pytest.param(
            lambda: ab.Segments(torch.arange(N) // 11, torch.arange(M) // 11), id="packed"
        ),
        pytest.param(lambda: ab.Segments(torch.arange(N) % 3, torch.arange(M) % 3), id="scattered"),
        pytest.param(
            lambda: ab.Segments(2 - torch.arange(N) // 14, torch.arange(M) // 14),
            id="packed the other way round",
        ),
        pytest.param(lambda: None, id="nothing"),
    ],
)
def test_masks(bias: Callable[[], Bias | None]) -> None:
    mask = bias()
    assert_gradients(problem(N, M, heads=1, groups=1), lambda: mask, bare=mask is not None)


@pytest.mark.parametrize("rows", [32, 64])
def test_whole_tiles_between_edges(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden entries on both sides, and tiles without a mask between them."""
    if DEVICE == "cpu":
        tile = Config(rows, 32, 4, 1, "ieee")
        monkeypatch.setattr(backward_configs, "queries", lambda *_: tile)
    n, m = 64, 150
    window = ab.Window(110, 20, queries=n, keys=m)
    given = problem(n, m, heads=1, groups=1, size=16, width=16)
    assert_gradients(given, lambda t: window + relative(t, n, m), [draw(n + m - 1)])


def test_queries_that_see_nothing() -> None:
    """No gradient comes from them, and none goes to keys that nobody sees."""
    ids = torch.arange(N) // 10
    mask = ab.Segments(ids, torch.where(torch.arange(M) < 20, 1, 2))
    given, table = problem(N, M), draw(HEADS, N + M - 1)
    dq, dk, dv, line = assert_gradients(given, lambda t: mask + relative(t), [table])
    for made in (dq, dk, dv, line):
        assert made is not None
    assert dq is not None
    assert not dq[:, :, :10].any()
    assert not dq[:, :, 30:].any()


@pytest.mark.parametrize("width", [24, 0])
def test_of_the_log_sum_exp_alone(width: int) -> None:
    given = problem(N, M, width=width)
    assert_gradients(given, ab.KeyBias, [draw(HEADS, M)], out=False)


def test_of_the_output_alone() -> None:
    assert_gradients(problem(N, M), relative, [draw(1, N + M - 1)], lse=False)


@pytest.mark.parametrize(
    ("n", "m", "size", "width"),
    [(1, 41, 16, 16), (37, 1, 16, 16), (33, 64, 8, 40), (64, 32, 72, 1), (2, 3, 48, 80)],
)
def test_odd_sizes(n: int, m: int, size: int, width: int) -> None:
    """One query, one key, whole tiles, head sizes in two parts."""
    given = problem(n, m, size=size, width=width)
    assert_gradients(
        given,
        lambda t, r: relative(t, n, m) + ab.KeyBias(r),
        [draw(HEADS, n + m - 1), draw(1, m)],
        bare=m > 1,
    )


@pytest.mark.parametrize("causal", [False, True])
def test_heads_in_groups(causal: bool) -> None:
    """dk and dv sum over the heads of a group, a bias has its own heads."""
    make, shapes = STRUCTURES["sum"]
    shapes = [tuple(4 if s == HEADS and len(t) > 2 else s for s in t) for t in shapes]
    shapes[1] = (4, N + M - 1)
    given = problem(N, M, heads=4, groups=2, size=16, width=16)
    assert_gradients(given, make, [draw(*s) for s in shapes], causal=causal)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 1), (1, HEADS), (2, HEADS)])
def test_parameters_broadcast(sizes: tuple[int, int]) -> None:
    n, m = 20, 33
    given = problem(n, m, size=16, width=16, batch=2)
    parameters = [draw(*sizes, m), draw(*sizes, n + m - 1), draw(*sizes, n, 2), draw(1, 1, m, 2)]
    assert_gradients(
        given, lambda r, t, u, v: ab.KeyBias(r) + relative(t, n, m) + ab.LowRank(u, v), parameters
    )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_formats(kind: torch.dtype) -> None:
    make, shapes = STRUCTURES["sum"]
    given = [t.to(kind) for t in problem(N, M)]
    near = 4 * torch.finfo(kind).eps
    found = assert_gradients(
        given, make, [draw(*s) for s in shapes], near=near, causal=True, bare=False
    )
    assert [t.dtype for t in found if t is not None] == [kind] * 3 + [torch.float32] * len(shapes)


def test_parameters_in_float64() -> None:
    make, shapes = STRUCTURES["relative"]
    found = assert_gradients(problem(N, M), make, [draw(*s).double() for s in shapes])
    assert found[3] is not None
    assert found[3].dtype == torch.float64


@pytest.mark.parametrize("name", ["relative", "low rank"])
def test_dropout(name: str) -> None:
    make, shapes = STRUCTURES[name]
    parameters = [draw(*s) for s in shapes]
    given = problem(N, M)
    found = assert_gradients(given, make, parameters, dropout=0.3)
    other = gradients(given, make, parameters)
    assert found[2] is not None
    assert other[2] is not None
    assert (found[2] - other[2]).abs().max() > 0.1


def test_only_what_is_wanted() -> None:
    """Nothing else is computed, and what is has the same bits."""
    n, m = 20, 33
    given, parameters = problem(n, m), [draw(HEADS, m), draw(n + m - 1), draw(n, 2), draw(m, 2)]

    def make(row: Tensor, table: Tensor, u: Tensor, v: Tensor) -> Bias:
        return ab.KeyBias(row) + relative(table, n, m) + ab.LowRank(u, v)

    fixed = make(*parameters)
    whole = gradients(given, make, parameters)
    for place in range(3):
        wanted = [at == place for at in range(3)]
        found = gradients(given, lambda: fixed, wanted=wanted)
        one, all_ = found[place], whole[place]
        assert one is not None
        assert all_ is not None
        assert torch.equal(one, all_)
        assert [t is not None for t in found] == wanted
    found = gradients(given, make, parameters, wanted=[False] * 3)
    assert found[:3] == [None] * 3
    for made, right in zip(found[3:], whole[3:], strict=True):
        assert made is not None
        assert right is not None
        assert torch.equal(made, right)


def test_the_same_bits_in_every_run() -> None:
    make, shapes = STRUCTURES["sum"]
    given, parameters = problem(N, M, heads=2, groups=1), [draw(*s) for s in shapes]
    runs = [gradients(given, make, parameters, causal=True, dropout=0.1) for _ in range(2)]
    for one, two in zip(*runs, strict=True):
        assert one is not None
        assert two is not None
        assert torch.equal(one, two)


@pytest.mark.parametrize("programs", [1, 3])
@pytest.mark.parametrize(("rows", "cols"), [(32, 16), (16, 32)])
def test_lines_are_shared(
    programs: int, rows: int, cols: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program walks several blocks of queries, heads and batch elements of one table."""
    monkeypatch.setattr(backward_launch, "PROGRAMS", programs)
    if DEVICE == "cpu":
        monkeypatch.setattr(
            backward_configs, "queries", lambda *_: Config(rows, cols, 4, 1, "ieee")
        )
    given = problem(N, M, size=16, width=16, batch=2)
    assert_gradients(given, relative, [draw(1, 1, N + M - 1)], causal=True)


def test_few_lines_where_they_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is bounded: with no room for more there is one for each entry of a table."""
    monkeypatch.setattr(backward_launch, "LINES", 1)
    sizes = []

    def seen(data: Tensor, *rest: int) -> object:
        sizes.append(tuple(data.shape))
        return Lines(data, *rest)

    monkeypatch.setattr(backward_launch, "Lines", seen)
    given = problem(N, M, size=1, width=16)
    assert_gradients(given, relative, [draw(HEADS, N + M - 1)])
    assert sizes == [(HEADS, 1, N + M - 1)]


def test_any_strides() -> None:
    """Heads inside rows and features apart, as models have them; a gradient that is expanded."""
    given = [draw(1, length, HEADS, 16).transpose(1, 2) for length in (N, M, M)]
    row = draw(HEADS, M)
    found = []
    for lowering, kind in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [t.detach().to(kind).requires_grad_() for t in [*given, row]]
        query, key, value, own = leaves
        key = key.mT.contiguous().mT
        out = ab.attention(query, key, value, bias=ab.KeyBias(own), lowering=lowering)
        assert isinstance(out, Tensor)
        found.append(torch.autograd.grad(out.sum(), leaves))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one.double(), two.double(), atol=1e-5, rtol=0)


def test_no_second_derivative() -> None:
    query, key, value = (t.requires_grad_() for t in problem(3, 5))
    out = ab.attention(query, key, value, lowering="triton")
    assert isinstance(out, Tensor)
    (step,) = torch.autograd.grad(out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        step.sum().backward()  # type: ignore[no-untyped-call]


def ranges(first: Tensor, last: Tensor) -> Given:
    places = Places(0, 0, first.int(), last.int(), first.shape[1])
    return Given((), (), None, 0, places, 0, True, None)


@pytest.mark.parametrize("ordered", [True, False])
def test_queries_of_a_block_of_keys(ordered: bool) -> None:
    """All that see a key of it, and some of those that see it whole; all of them in order."""
    m, cols = 100, 16
    for _ in range(50):
        first, length = torch.randint(0, m, (2, 2, 60), device=DEVICE)
        last = (first + length // 2).clamp(max=m)
        if ordered:
            first, last = first.sort(-1).values, last.sort(-1).values
        found = rows_of_blocks(ranges(first, last), cols, m)
        assert found is not None
        i = torch.arange(60, device=DEVICE)
        for block in range(-(-m // cols)):
            left, right = block * cols, min(block * cols + cols, m)
            some = (first < right) & (last > left) & (last > first)
            every = (first <= left) & (last >= right) | (last <= first)
            for b in range(2):
                inside = (i >= found.first[b, block]) & (i < found.last[b, block])
                assert not bool((some[b] & ~inside).any())
                whole = (i >= found.inner[b, block]) & (i < found.ended[b, block])
                assert not bool((whole & ~every[b]).any())
                if ordered and bool(some[b].any()):
                    seen = i[some[b]]
                    assert int(found.first[b, block]) == int(seen[0])
                    assert int(found.last[b, block]) == int(seen[-1]) + 1


def test_wide_heads() -> None:
    """Too wide for the registers: products in chunks of features."""
    given = problem(20, 33, size=144, width=160, heads=1, groups=1)
    given[0] *= 0.3
    assert_gradients(given, lambda t: relative(t, 20, 33), [draw(1, 52)], near=1e-5)
