"""The compiled attention: what it reads as it is, in ranges and strips, beside float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias import native
from attnbias.lowering import own_parts
from tests.cases.bias import agree

pytestmark = pytest.mark.skipif(
    not native.installed(), reason="compiled loops: the extra native is not installed"
)
N, M, HEADS, GROUPS = 150, 170, 4, 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def table(heads: int = HEADS) -> ab.Bias:
    return ab.Relative(draw(heads, N + M - 1), queries=N, keys=M)


CASES = {
    "zeros": lambda: ab.KeyBias(torch.zeros(M)),
    "table": table,
    "key bias": lambda: ab.KeyBias(draw(2, HEADS, M)),
    "low rank": lambda: ab.LowRank(draw(N, 3), draw(M, 3, seed=1)),
    "low rank of each head": lambda: (
        ab.LowRank(draw(HEADS, N, 3), draw(HEADS, M, 3, seed=1))
        + ab.LowRank(draw(2, 1, N, 2), draw(1, 1, M, 2, seed=1))
    ),
    "pairs of all batch elements": lambda: ab.Dense(draw(1, HEADS, N, M)),
    "pairs of all heads": lambda: ab.Dense(draw(2, 1, N, M)),
    "a number for each query": lambda: ab.Dense(draw(1, HEADS, N, 1)) + table(),
    "a row of pairs and a table": lambda: ab.Dense(draw(1, 1, 1, M)) + table(1),
    "window": lambda: ab.Window(20, 10, queries=N, keys=M) + table(1),
    "padding at the end": lambda: ab.Padding(torch.arange(M) < torch.tensor([[M], [90]])) + table(),
    "padding anywhere": lambda: ab.Padding(draw(2, M) > 0) + table(1),
    "segments in order": lambda: ab.Segments(torch.arange(N) // 40, torch.arange(M) // 40),
    "segments of each batch element": lambda: ab.Segments(
        torch.stack([torch.arange(N) // 40, torch.arange(N) // 70]),
        torch.stack([torch.arange(M) // 40, torch.arange(M).flip(0) // 70]),
    ),
    "segments in pieces": lambda: ab.Segments(torch.arange(N) % 3, torch.arange(M) % 3),
}


def both(
    make, lowering: str, causal: bool, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> list[Tensor]:
    """Output, log-sum-exp and all gradients."""
    shapes = [(HEADS, N, 40), (GROUPS, M, 40), (GROUPS, M, 24)]
    own = [draw(2, *s).to(dtype).requires_grad_() for s in shapes]
    bias = make()
    given = [p.detach().requires_grad_() for p in bias.parameters()]
    out, lse = ab.attention(
        *own,
        bias=bias.with_parameters(given),
        causal=causal,
        lowering=lowering,
        dropout=dropout,
        generator=torch.Generator().manual_seed(5),
        return_lse=True,
    )
    total = (out.double() * draw(*out.shape).double()).sum()
    total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * draw(*lse.shape)).sum()
    slopes = torch.autograd.grad(total, [*own, *given], materialize_grads=True, allow_unused=True)
    return [out.detach(), lse.detach(), *slopes]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str, causal: bool) -> None:
    found, want = (both(CASES[name], low, causal) for low in ("own", "reference"))
    for place, (a, b) in enumerate(zip(found, want, strict=True)):
        assert torch.equal(a == -torch.inf, b == -torch.inf)
        a, b = (t.masked_fill(t == -torch.inf, 0.0) for t in (a, b))
        agree(a, b.double(), 1e-5, f"{name} {place}")


def test_many_tiles_of_keys() -> None:
    """The largest score comes late, so that what was summed before has to fade."""
    n, m = 90, 1300
    q, k, v = (draw(1, 2, size, 16, seed=size) for size in (n, m, m))
    for causal in (False, True):
        rise = ab.KeyBias(torch.linspace(-4.0, 4.0, m)) + ab.Relative(
            draw(2, n + m - 1), queries=n, keys=m
        )
        found = []
        for low in ("own", "reference"):
            own = [t.clone().requires_grad_() for t in (q, k, v)]
            given = [p.detach().requires_grad_() for p in rise.parameters()]
            out = ab.attention(*own, bias=rise.with_parameters(given), causal=causal, lowering=low)
            slopes = torch.autograd.grad((out * draw(*out.shape)).sum(), [*own, *given])
            found.append([out.detach(), *slopes])
        for a, b in zip(*found, strict=True):
            agree(a, b.double(), 1e-5)


@pytest.mark.parametrize("name", ["table", "pairs of all batch elements", "segments in pieces"])
def test_drops_what_the_other_lowerings_drop(name: str) -> None:
    found, want = (both(CASES[name], low, True, dropout=0.3) for low in ("own", "stream"))
    for place, (a, b) in enumerate(zip(found, want, strict=True)):
        a, b = (t.masked_fill(t == -torch.inf, 0.0) for t in (a, b))
        agree(a, b.double(), 2e-5, f"{name} {place}")
    assert not torch.equal(found[0], both(CASES[name], "own", True)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_are_computed_in_float32(dtype: torch.dtype) -> None:
    found, want = (both(table, low, True, dtype) for low in ("own", "reference"))
    for place, (a, b) in enumerate(zip(found, want, strict=True)):
        assert a.dtype == b.dtype
        a, b = (t.masked_fill(t == -torch.inf, 0.0) for t in (a, b))
        agree(a, b.double(), 1e-2 if dtype == torch.bfloat16 else 2e-3, f"{place}")


@pytest.mark.parametrize("name", ["segments in pieces", "a number for each query"])
def test_small_strips_are_parts_of_large_ones(name: str, monkeypatch) -> None:
    whole = both(CASES[name], "own", True)
    monkeypatch.setattr(own_parts, "ENTRIES", 64 * 100)
    for a, b in zip(both(CASES[name], "own", True), whole, strict=True):
        a, b = (t.masked_fill(t == -torch.inf, 0.0) for t in (a, b))
        agree(a, b.double(), 1e-5)


def test_one_head_is_cut_by_keys_where_there_are_several_threads(monkeypatch) -> None:
    """The gradient of the queries is summed over parts of the keys, in one order."""
    from attnbias.lowering import own_passes

    n = 600
    q, k, v = (draw(1, 1, n, 16, seed=s).requires_grad_() for s in range(3))
    given = draw(1, 2 * n - 1).requires_grad_()

    def run() -> tuple[Tensor, ...]:
        bias = ab.Relative(given, queries=n, keys=n)
        out = ab.attention(q, k, v, bias=bias, causal=True, lowering="own")
        return torch.autograd.grad(out.square().sum(), (q, k, v, given))

    whole = run()
    monkeypatch.setattr(own_passes, "_chunks", lambda ready, units: 3)
    parts, again = run(), run()
    for a, b, c in zip(whole, parts, again, strict=True):
        agree(b, a.double(), 1e-5)
        assert torch.equal(b, c)


def test_a_compiled_model_goes_around_the_loops() -> None:
    q, k, v, given = (draw(1, 2, 64, 16, seed=s).requires_grad_() for s in range(4))
    places = given[0, :, :, 0].repeat(1, 2)[:, :127]

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = ab.Relative(table, queries=64, keys=64)
        return ab.attention(q * 2, k, v, bias=bias, lowering="own") + 1

    found = torch.compile(call, backend="eager")(q, k, v, places)
    want = call(q, k, v, places)
    assert torch.equal(found, want)
    slopes = [torch.autograd.grad(out.sum(), (q, k, v, given)) for out in (found, want)]
    assert all(torch.equal(a, b) for a, b in zip(*slopes, strict=True))


def test_it_is_chosen_where_it_was_measured_to_win() -> None:
    q = torch.empty(1, 8, 2048, 64, device="meta")
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("own: measured on processors with AVX-512 only")
    some = ab.Relative(torch.empty(8, 4095, device="meta"), queries=2048, keys=2048)
    assert ab.explain(q, q, q, bias=some).chosen == "own"
    assert ab.explain(q, q, q, dropout=0.1).chosen == "own"
    assert ab.explain(q, q, q).chosen == "sdpa"
    few = torch.empty(1, 2, 32, 64, device="meta")
    own = ab.explain(few, q[:, :2], q[:, :2], bias=ab.KeyBias(torch.zeros(2048)))
    assert own.chosen == "sdpa"
    with native.disabled():
        assert ab.explain(q, q, q, bias=some).chosen == "strided"
