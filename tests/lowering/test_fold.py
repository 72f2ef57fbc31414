"""Folding: what is left out of the scores comes back, the bound holds, and beyond it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias import native
from attnbias.lowering import LOWERINGS, Problem, backward, columns
from attnbias.lowering.columns import LIMITS, Folding


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n: int, m: int, kind: torch.dtype = torch.float32, heads: int = 2, size: int = 8):
    return tuple(normal(1, heads, x, size, seed=s).to(kind) for s, x in enumerate((n, m, m)))


def line(n: int, m: int, slope: float = 0.5) -> ab.LowRank:
    """ALiBi's factors as published: ``slope (j - i)``, positions and constants."""
    i, j = torch.arange(n).float(), torch.arange(m).float()
    u = torch.stack([torch.ones(n), -slope * i], -1)
    return ab.LowRank(u, torch.stack([slope * j, torch.ones(m)], -1))


def answer(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    score = q.double() @ k.double().mT / math.sqrt(q.shape[-1]) + bias.double()
    seen = (score > -torch.inf).any(-1)
    safe = torch.where(seen[..., None], score, 0.0)
    weight = torch.where(seen[..., None], safe.softmax(-1), 0.0)
    return weight @ v.double(), torch.where(seen, safe.logsumexp(-1), -torch.inf)


def offer(name: str, q: Tensor, k: Tensor, v: Tensor, bias: ab.Bias, causal: bool = False):
    found = ab.explain(q, k, v, bias=bias, causal=causal).offers
    return next(o for o in found if o.lowering == name)


def scores(q: Tensor, k: Tensor, bias: ab.LowRank, kind: torch.dtype) -> tuple[Tensor, Folding]:
    """The folded part of the scores alone, as the operator sees it, plus what is left out."""
    plan = Folding(Problem(q.to(kind), k.to(kind), k.to(kind), bias, 0.5))
    real = torch.float64
    n, m = q.shape[2], k.shape[2]
    total = torch.zeros(1, 1, n, m, dtype=real)
    for u, v in zip(plan.queries(), plan.keys(), strict=True):
        # Products of the columns as stored in the format, summed exactly.
        total = total + 0.5 * (u.to(kind).to(real) @ v.to(kind).to(real).mT)
    for block in plan.blocks:
        row = plan.key_row(block)
        if row is not None:
            total[:, :, block] += row[:, :, None]
    assert plan.row is not None
    return total + plan.row[..., None], plan


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["normal", "line", "constants"])
def test_columns_and_what_is_left_out_make_the_bias(case: str, kind: torch.dtype) -> None:
    n, m = 600, 700
    bias = {
        "normal": ab.LowRank(normal(n, 3), normal(m, 3, seed=1)),
        "line": line(n, m),
        "constants": ab.LowRank(normal(n, 2) + 9.0, normal(m, 2, seed=1) - 7.0),
    }[case]
    q, k, _ = inputs(n, m, heads=1)
    got, plan = scores(q, k, bias, kind)
    assert not plan.refusal
    error = float((got - bias.dense().double()).abs().max())
    assert error <= max(plan.error, 2e-7 * float(bias.dense().abs().max())), (error, plan.error)
    if case == "line":
        assert plan.columns == 0, "a number per key and one per query: nothing is left to fold"


def naive(positions: int, slope: float, kind: torch.dtype) -> float:
    """Largest error of a score of the last query's last 64 keys, with the factors in a format."""
    i, j = float(positions - 1), torch.arange(positions - 64, positions).double()
    u = torch.tensor([1.0, -slope * i]).to(kind).double()
    v = torch.stack([slope * j, torch.ones_like(j)], -1).to(kind).double()
    error = v @ u - slope * (j - i)
    return float(error.max() - error.min())  # softmax sees differences


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16], ids=str)
def test_naive_folding_fails_in_half_and_ours_does_not(kind: torch.dtype) -> None:
    """At 8,192 positions the naive columns err by more than half a logit; ours keep their bound."""
    n, rows = 8192, 256
    assert naive(n, 2.0**-0.5, kind) > 0.5
    q, k, v = inputs(n, n, kind, heads=1)
    whole = line(n, n, 2.0**-0.5)
    last = whole[..., n - rows : n, 0:n]
    assert isinstance(last, ab.LowRank)
    q = q[:, :, -rows:]
    got, plan = scores(q, k, last, kind)
    assert plan.error <= LIMITS[kind]
    near = slice(n - 64, n)
    gap = (got - last.dense().double())[..., near]
    assert float((gap - gap.mean(-1, keepdim=True)).abs().max()) <= max(plan.error, 1e-4)
    out = ab.attention(q, k, v, bias=last, lowering="fold")
    want, _ = answer(q, k, v, last.dense())
    assert (
        float((out.double() - want).abs().max()) < {torch.float16: 4e-3, torch.bfloat16: 3e-2}[kind]
    )


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds_on_the_scores_of_the_operator(seed: int) -> None:
    """Keys one-hot in the values: the log-sum-exp of one visible key is its score."""
    n = 512
    u, v = normal(n, 8, seed=seed), normal(n, 8, seed=seed + 10)
    bias = ab.LowRank(u, v)
    q, k, w = inputs(n, n, heads=1, size=32)
    q, k = q * 0, k
    error = offer("fold", q, k, w, bias).error
    assert 0 < error <= 1e-5
    worst = 0.0
    for key in range(0, n, 37):
        only = torch.arange(n) == key
        _, lse = ab.attention(
            q, k, w, bias=bias + ab.Padding(only), lowering="fold", return_lse=True
        )
        want = (u.double() * v[key].double()).sum(-1)
        worst = max(worst, float((lse[0, 0].double() - want).abs().max()))
    assert 1e-9 < worst <= error


def test_row_constants_come_back_in_the_lse() -> None:
    q, k, v = inputs(20, 30)
    bias = ab.LowRank(normal(20, 2) + 3, torch.cat([normal(30, 1, seed=1), torch.ones(30, 1)], -1))
    out, lse = ab.attention(q, k, v, bias=bias, lowering="fold", return_lse=True)
    want, want_lse = answer(q, k, v, bias.dense())
    assert "1 columns" in offer("fold", q, k, v, bias).reason
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-5, rtol=0)


def test_squared_distance_of_coordinates_folds_in_as_many_columns() -> None:
    x, y = normal(1, 40, 3), normal(1, 50, 3, seed=1)
    bias = ab.Distance(x, y, ab.radial.Squared(torch.tensor([-0.5, -0.1])))
    q, k, v = inputs(40, 50)
    found = offer("fold", q, k, v, bias)
    assert "3 columns" in found.reason
    out = ab.attention(q, k, v, bias=bias, lowering="fold")
    distance = torch.cdist(x.double(), y.double()).square()
    want, _ = answer(q, k, v, torch.tensor([-0.5, -0.1])[:, None, None] * distance)
    torch.testing.assert_close(out.double(), want, atol=3e-6, rtol=0)


@pytest.mark.parametrize("direction", ["none", "causal", "late", "future"])
def test_blocks_of_queries(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large positions, centred on blocks; pieces of keys before a block and on the diagonal."""
    monkeypatch.setattr(columns, "BLOCKS", (64, 16))
    n, m = 200, 230
    far = torch.arange(n).float()[:, None]  # an offset that grows along the queries
    bias: ab.Bias = line(n, m) + ab.LowRank(normal(n, 1) + far, normal(m, 1, seed=1))
    i, j = torch.arange(n)[:, None], torch.arange(m)
    seen = {
        "none": torch.ones(n, m, dtype=torch.bool),
        "causal": j <= i + 30,
        "late": j <= i - 20,
        "future": j >= i + 5,
    }[direction]
    mask = {
        "none": None,
        "causal": ab.Causal(n, m),
        "late": ab.Causal(n, m, offset=-20),
        "future": ab.Window(0, None, queries=n, keys=m, offset=5),
    }[direction]
    keep = torch.arange(m) % 7 != 0
    total = bias + ab.Padding(keep) if mask is None else bias + ab.Padding(keep) + mask
    q, k, v = (t.requires_grad_() for t in inputs(n, m))
    entries = bias.with_parameters([p.double() for p in bias.parameters()]).dense()
    want, want_lse = answer(q, k, v, entries.masked_fill(~(seen & keep), -torch.inf))
    assert len(Folding(Problem(q, k, v, total, 0.35)).blocks) > 1
    out, lse = ab.attention(q, k, v, bias=total, lowering="fold", return_lse=True)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), want_lse, atol=5e-5, rtol=0)
    step = normal(*out.shape, seed=5)
    tail = torch.where(want_lse > -torch.inf, normal(*lse.shape, seed=6), 0.0)

    def total_of(o: Tensor, ls: Tensor) -> Tensor:
        return (o * step).sum() + (torch.where(tail == 0, 0.0, ls) * tail).sum()

    got = torch.autograd.grad(total_of(out, lse), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(total_of(want, want_lse), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b.float(), atol=2e-4, rtol=0)


def test_refuses_where_the_bound_fails() -> None:
    q, k, v = inputs(300, 300)
    large = ab.LowRank(100 * normal(300, 2), 100 * normal(300, 2, seed=1))
    found = offer("fold", q, k, v, large)
    assert found.refused
    assert "may err by" in found.reason
    with pytest.raises(ab.Refused, match="more than 1e-05"):
        ab.attention(q, k, v, bias=large, lowering="fold")
    out = ab.attention(q, k, v, bias=large)  # another lowering takes it
    want, _ = answer(q, k, v, large.dense())
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=0)
    assert not offer("fold", q.double(), k.double(), v.double(), large * 0.1).refused


def test_refusals_in_words() -> None:
    q, k, v = inputs(30, 30)
    low = ab.LowRank(normal(30, 2), normal(30, 2))
    assert "nothing to fold" in offer("fold", q, k, v, ab.KeyBias(normal(30))).reason
    assert "no exact factors" in offer("fold", q, k, v, ab.Dense(normal(1, 1, 30, 30))).reason
    wide = ab.LowRank(normal(30, 99), normal(30, 99))
    assert "cost more than tiles" in offer("fold", q, k, v, wide).reason
    assert "strided" in offer("fold", q, k, v, low + ab.forms.ALiBi(2)(30)).reason
    half = (t.half() for t in (q, k, v))
    tall = ab.LowRank(1e5 * normal(30, 1), 1e-6 * normal(30, 1))
    assert "float16 ends at" in offer("fold", *half, tall).reason
    with pytest.raises(ab.Refused, match="scale of 0"):
        ab.attention(q, k, v, bias=low, scale=0.0, lowering="fold")


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_sums_with_a_relative_bias(causal: bool, kind: torch.dtype) -> None:
    """A table, key numbers, scattered padding and two columns, with rows that see nothing."""
    n, m = 270, 300
    real = torch.float64 if kind == torch.float64 else torch.float32
    q, k, v = (t.requires_grad_() for t in inputs(n, m, kind))
    table = ab.Relative(normal(2, n + m - 1).to(real), queries=n, keys=m)
    key, keep = normal(2, m, seed=3).to(real) + 40, torch.arange(m) % 5 != 0
    keep[:60] = False  # under the causal mask the first queries see nothing
    low = ab.LowRank(normal(n, 2, seed=4).to(real), normal(2, m, 2, seed=5).to(real))
    total = table + ab.KeyBias(key) + low + ab.Padding(keep)
    matrix = (table.dense() + key[None, :, None] + low.dense()).masked_fill(~keep, -torch.inf)
    if causal:
        late = torch.arange(m) > torch.arange(n)[:, None] + m - n
        matrix = matrix.masked_fill(late, -torch.inf)
    want, want_lse = answer(q, k, v, matrix)
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
    out, lse = ab.attention(q, k, v, bias=total, causal=causal, lowering="strided", return_lse=True)
    assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
    assert bool((lse == -torch.inf).any()) == causal
    seen = want_lse > -torch.inf
    for got, right in ((out, want), (lse[seen], want_lse[seen])):
        error = (
            got.detach().double() - right.detach()
        ).abs().max() / right.detach().abs().max().clamp(min=1)
        assert float(error) <= limit[kind]
    step = normal(*out.shape, seed=9).double()
    grads = [torch.autograd.grad((o.double() * step).sum(), (q, k, v)) for o in (out, want)]
    for a, b in zip(*grads, strict=True):
        error = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert float(error) <= 4 * limit[kind]


def test_sums_offer_at_length_and_say_what_they_fold() -> None:
    q, k, v = inputs(512, 512, size=64)
    bias = ab.forms.ALiBi(2)(512) + ab.KeyBias(normal(2, 512))
    with native.disabled():
        found = ab.explain(q, k, v, bias=bias)
    assert found.chosen == "strided"
    assert "1 columns" in found.offers[0].reason
    assert found.offers[0].time <= 1.15
    assert 0 < found.offers[0].error <= 1e-5
    huge = offer("strided", q, k, v, ab.forms.ALiBi(2)(512) + ab.KeyBias(1e3 * normal(512)))
    assert huge.refused
    assert "folding the key bias may err" in huge.reason


def test_meta_tensors_are_explained_by_shape() -> None:
    q = torch.empty(1, 2, 4096, 64, device="meta")
    factor = torch.empty(4096, 8, device="meta")
    with native.disabled():
        found = ab.explain(q, q, q, bias=ab.LowRank(factor, factor))
    assert found.chosen == "fold"
    assert "8 columns" in found.offers[0].reason


def test_gradients_reach_the_factors_and_repeat() -> None:
    q, k, v = (t.requires_grad_() for t in inputs(40, 50))
    u, w = normal(2, 40, 3).requires_grad_(), normal(50, 3, seed=1).requires_grad_()
    found = []
    for _ in range(2):
        out = ab.attention(q, k, v, bias=ab.LowRank(u, w), lowering="fold")
        found.append(torch.autograd.grad(out.square().sum(), (q, k, v, u, w)))
    want, _ = answer(q, k, v, (u.double() @ w.double().mT)[None])
    for a, b, c in zip(
        *found, torch.autograd.grad(want.square().sum(), (q, k, v, u, w)), strict=True
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, atol=1e-4, rtol=1e-4)


def test_fold_is_asked() -> None:
    assert "fold" in LOWERINGS


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_learned_factors_go_through_the_fused_backward(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a column that is constant, factors that broadcast, and the log-sum-exp's gradient."""
    monkeypatch.setattr(backward, "learned", None)  # the other route must not be taken
    n, m = 60, 70
    q, k, v = inputs(n, m, kind)
    u, w = normal(2, n, 3), normal(m, 3, seed=1)
    u[..., 0], w[..., 1] = 1.0, -2.0
    u.requires_grad_()
    w.requires_grad_()
    keep = torch.arange(m) % 6 != 0
    bias = ab.LowRank(u, w) + ab.Padding(keep)
    out, lse = ab.attention(q, k, v, bias=bias, causal=True, lowering="fold", return_lse=True)
    late = torch.arange(m) > torch.arange(n)[:, None] + m - n
    matrix = (u.double() @ w.double().mT)[None].masked_fill(~keep | late, -torch.inf)
    want, want_lse = answer(q, k, v, matrix)
    step, tail = normal(*out.shape, seed=5), normal(*lse.shape, seed=6)
    got = torch.autograd.grad((out * step).sum() + (lse * tail).sum(), (u, w))
    right = torch.autograd.grad((want * step).sum() + (want_lse * tail).sum(), (u, w))
    limit = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[kind]
    for a, b in zip(got, right, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).abs().max()) <= limit * float(b.abs().max())


def test_learned_factors_that_need_centring_take_the_other_route() -> None:
    q, k, v = inputs(300, 300)
    made = line(300, 300)
    u, w = made.u.clone().requires_grad_(), made.v.clone().requires_grad_()
    out = ab.attention(q, k, v, bias=ab.LowRank(u, w), lowering="fold")
    got = torch.autograd.grad(out.square().sum(), (u, w))
    want, _ = answer(q, k, v, u.double() @ w.double().mT)
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), (u, w)), strict=True):
        # Positions of hundreds cancel in a float32 sum.
        assert float((a - b).abs().max()) <= 5e-3 * float(b.abs().max())
