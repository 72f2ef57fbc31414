"""The entry: gradients by finite differences, merging, precision, refusals, explanations."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

import attnbias as ab
from attnbias.lowering import LOWERINGS, costs
from attnbias.lowering import flash as flash_module
from tests.cases.bias import loops


def qkv(b=1, h=2, n=5, m=7, d=4, groups=None, kind=torch.float64):
    groups = h if groups is None else groups
    return (
        torch.randn(b, h, n, d, dtype=kind),
        torch.randn(b, groups, m, d, dtype=kind),
        torch.randn(b, groups, m, d, dtype=kind),
    )


def _biases() -> dict[str, Callable[[int, int, int], ab.Bias | None]]:
    return {
        "none": lambda h, n, m: None,
        "key": lambda h, n, m: ab.KeyBias(torch.randn(h, m, dtype=torch.float64)),
        "relative": lambda h, n, m: ab.Relative(
            torch.randn(h, n + m - 1, dtype=torch.float64), queries=n, keys=m
        ),
        "window": lambda h, n, m: ab.Window(2, 1, queries=n, keys=m),
        "dense": lambda h, n, m: ab.Dense(torch.randn(1, h, n, m, dtype=torch.float64)),
        "sum": lambda h, n, m: (
            ab.KeyBias(torch.randn(m, dtype=torch.float64))
            + ab.Relative(torch.randn(1, n + m - 1, dtype=torch.float64), queries=n, keys=m)
            + ab.Padding(torch.rand(1, m) > 0.3)
        ),
    }


@pytest.mark.parametrize("lowering", list(LOWERINGS))
@pytest.mark.parametrize("name", list(_biases()))
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(lowering: str, name: str, causal: bool) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(groups=1))
    bias = _biases()[name](2, 5, 7)
    params = [] if bias is None else [p.detach().requires_grad_() for p in bias.parameters()]

    def run(q, k, v, *params):
        own = bias.with_parameters(params) if params else bias
        return ab.attention(
            q,
            k,
            v,
            bias=own,
            causal=causal,
            offset=0 if causal else None,
            lowering=lowering,
            return_lse=True,
        )

    answers = ab.explain(q, k, v, bias=bias, causal=causal, offset=0 if causal else None)
    if next(o for o in answers.offers if o.lowering == lowering).refused:
        with pytest.raises(ab.Refused, match="refuses"):
            run(q, k, v, *params)
        return
    assert torch.autograd.gradcheck(run, (q, k, v, *params))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_merge_joins_disjoint_keys_with_gradients(parts: int) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(n=4, m=9))
    bias = ab.KeyBias(torch.randn(9, dtype=torch.float64))
    edges = [0, 4, 9, 9][: parts + 1] if parts < 3 else [0, 4, 4, 9]
    edges[-1] = 9

    def whole(q, k, v):
        return ab.attention(q, k, v, bias=bias, return_lse=True)

    def split(q, k, v):
        pieces = [
            ab.attention(q, k[:, :, a:b], v[:, :, a:b], bias=bias[..., :, a:b], return_lse=True)
            for a, b in pairwise(edges)
        ]
        return ab.merge(pieces)

    for got, want in zip(split(q, k, v), whole(q, k, v), strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(split, (q, k, v))


def test_merge_of_empty_rows_is_zero_and_minus_infinity_without_nan() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(n=3, m=4))
    hide = ab.KeyBias(torch.full((4,), -torch.inf))
    empty = ab.attention(q, k, v, bias=hide, return_lse=True)
    full = ab.attention(q, k, v, return_lse=True)
    assert torch.equal(empty[0], torch.zeros_like(empty[0]))
    assert (empty[1] == -torch.inf).all()
    out, lse = ab.merge([empty, empty])
    assert (lse == -torch.inf).all()
    assert torch.equal(out, torch.zeros_like(out))
    out, lse = ab.merge([empty, full, empty])
    torch.testing.assert_close(out, full[0])
    torch.testing.assert_close(lse, full[1])
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 2, 0, 3), (1, 2, 3, 0), (1, 2, 1, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_empty_and_one_token_inputs_stay_in_the_graph(shape, causal: bool) -> None:
    b, h, n, m = shape
    q, k, v = (t.requires_grad_() for t in qkv(b, h, n, m))
    bias = ab.forms.ALiBi(h)(n, m)
    out, lse = ab.attention(q, k, v, bias=bias, causal=causal, return_lse=True)
    assert out.shape == (b, h, n, 4)
    assert lse.shape == (b, h, n)
    if m == 0:
        assert (lse == -torch.inf).all()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_long_ramp_in_half_precision_keeps_its_logits(kind: torch.dtype) -> None:
    """Causal ALiBi as a key bias: stored in half precision it would be wrong by whole logits."""
    n = 3000
    q, k, v = (t.to(kind) for t in qkv(n=n, m=n, d=8))
    ramp = 0.5 * torch.arange(n)
    want = ab.attention(q, k, v, bias=ab.KeyBias(ramp), causal=True, lowering="reference")
    limit = 0.02 if kind == torch.bfloat16 else 0.003
    for lowering in ("sdpa", "tiled"):
        got = ab.attention(q, k, v, bias=ab.KeyBias(ramp), causal=True, lowering=lowering)
        assert (got - want).abs().max() < limit
    rounded = ab.KeyBias(ramp.to(kind))
    wrong = ab.attention(q, k, v, bias=rounded, causal=True, lowering="sdpa")
    assert (wrong - want).abs().max() > 4 * limit


def test_autocast_reaches_the_passes_by_tiles() -> None:
    """Half queries, float32 scores and gradients, stored parameters as they are."""
    q, k, v = (t.requires_grad_() for t in qkv(kind=torch.float32, n=40, m=50))
    table = torch.randn(2, 89, requires_grad=True)
    bias = ab.Relative(table, queries=40, keys=50)
    for options in ({}, {"normaliser": "sigmoid"}, {"dropout": 0.2}):
        found = []
        for low in ("stream", "reference"):
            torch.manual_seed(0)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = ab.attention(q, k, v, bias=bias, lowering=low, **options)
            assert out.dtype == torch.bfloat16
            grads = torch.autograd.grad(out.float().square().sum(), (q, k, v, table))
            assert [g.dtype for g in grads] == [torch.float32] * 4
            found.append(grads)
        for a, b in zip(*found, strict=True):
            assert float((a - b).abs().max()) < 0.05 * max(1.0, float(b.abs().max()))


def test_autocast_casts_like_every_matrix_product() -> None:
    q, k, v = qkv(kind=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = ab.attention(q, k, v, bias=ab.KeyBias(torch.randn(7)), return_lse=True)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = F.scaled_dot_product_attention(q, k, v)
        ours = ab.attention(q, k, v)
    assert ours.dtype == stock.dtype
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_without_a_bias_it_is_the_stock_operator_bit_for_bit(kind, causal: bool) -> None:
    q, k, v = qkv(n=70, m=70, d=16, kind=kind)
    stock = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert torch.equal(ab.attention(q, k, v, causal=causal), stock)


@pytest.mark.parametrize("lowering", ["strided", "tiled", "stream"])
def test_gradients_repeat_bit_for_bit(lowering: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(h=4, n=300, m=300, d=16, kind=torch.float32))
    table = torch.randn(4, 599, requires_grad=True)
    runs = []
    for _ in range(2):
        bias = ab.Relative(table, queries=300, keys=300)
        out = ab.attention(q, k, v, bias=bias, causal=True, lowering=lowering)
        runs.append(torch.autograd.grad(out.square().sum(), [q, k, v, table]))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)


def test_forward_alone_gives_no_graph_and_lse_alone_has_a_gradient() -> None:
    q, k, v = qkv()
    assert not ab.attention(q, k, v).requires_grad
    q.requires_grad_()
    _, lse = ab.attention(q, k, v, return_lse=True)
    (grad,) = torch.autograd.grad(lse.sum(), q)
    weight = (q.detach() @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(grad, weight @ k / 2)


def test_a_fast_forward_serves_a_learned_bias() -> None:
    """The planner takes the same lowering as without gradients, and says what both passes cost."""
    q, k, v = qkv(n=300, m=300, kind=torch.float32)
    for bias, name in [
        (ab.KeyBias(torch.randn(300, requires_grad=True)), "sdpa"),
        (ab.Relative(torch.randn(599, requires_grad=True), queries=300, keys=300), "strided"),
    ]:
        with costs.unmeasured():
            learned = ab.explain(q, k, v, bias=bias)
            with torch.no_grad():
                fixed = ab.explain(q, k, v, bias=bias)
        assert learned.chosen == fixed.chosen == name
        assert learned.offers[0].time > fixed.offers[0].time
        out = ab.attention(q, k, v, bias=bias)
        (grad,) = torch.autograd.grad(out.sum(), bias.parameters())
        assert grad.abs().sum() > 0


CHOICES = [
    (lambda n: None, False, "sdpa"),
    (lambda n: ab.KeyBias(torch.randn(n)), True, "sdpa"),
    (lambda n: ab.Padding(torch.ones(1, n, dtype=torch.bool)), False, "sdpa"),
    (lambda n: ab.forms.ALiBi(2)(n), False, "strided"),
    (lambda n: ab.forms.ALiBi(2)(n), True, "strided"),
    (lambda n: ab.Window(5, 0, queries=n, keys=n), False, "strided"),
    (lambda n: ab.forms.ALiBi(2)(n) + ab.KeyBias(torch.randn(n)), True, "own or strided"),
    (lambda n: ab.Segments(torch.arange(n) // 9, torch.arange(n) // 9), True, "own or tiled"),
    (lambda n: ab.Dense(torch.randn(1, 1, n, n)), False, "sdpa"),
]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("make", "causal", "want"), CHOICES)
def test_the_planner_takes_the_cheapest_exact_offer_and_says_why(
    make, causal, want, compiled: bool
) -> None:
    q, k, v = (torch.empty(1, 2, 512, 8, device="meta") for _ in range(3))
    with loops(compiled), costs.unmeasured():
        plan = ab.explain(q, k, v, bias=make(512), causal=causal)
    if " or " in want:
        choices = want.split(" or ")
        # The compiled loop is priced by what it was measured to cost, which was with AVX-512.
        wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
        allowed = choices[1:] if not compiled else choices[:1] if wide else [*choices, "stream"]
        assert plan.chosen in allowed
        want = plan.chosen
    assert plan.chosen == want
    text = str(plan)
    assert f"->  {want}" in text
    assert all(o.reason for o in plan.offers)
    assert {o.lowering for o in plan.offers} == set(LOWERINGS)


BAD = [
    (lambda q, k, v: ab.attention(q[0], k, v), "query must have shape"),
    (lambda q, k, v: ab.attention(q, k.float(), v), "share one dtype"),
    (lambda q, k, v: ab.attention(q, k[:, :, :2], v), "key and value must agree"),
    (lambda q, k, v: ab.attention(q[..., :2], k, v), "query and key must agree"),
    (lambda q, k, v: ab.attention(q.repeat(1, 2, 1, 1)[:, :3], k, v), "multiple"),
    (lambda q, k, v: ab.attention(q, k, v, bias=torch.randn(1)), "ab.Dense"),
    (lambda q, k, v: ab.attention(q, k, v, bias=ab.KeyBias(torch.randn(3))), "keys is 3"),
    (lambda q, k, v: ab.attention(q, k, v, bias=ab.KeyBias(torch.randn(3, 7))), "heads is 3"),
    (lambda q, k, v: ab.attention(q, k, v, offset=1), "causal=True"),
    (lambda q, k, v: ab.attention(q, k, v, lowering="fast"), "lowering must be one of"),
    (lambda q, k, v: ab.attention(q, k, v, lowering="strided"), "nothing depends"),
    (lambda q, k, v: ab.attention(q, k, v, sink=torch.randn(3)), "sink must have shape"),
    (lambda q, k, v: ab.attention(q[..., :0], k[..., :0], v), "at least one feature"),
    (lambda q, k, v: ab.attention(q.long(), k.long(), v.long()), "one dtype of float16"),
    (lambda q, k, v: ab.merge([]), "at least one"),
    (lambda q, k, v: ab.merge([(q, q)]), "pairs"),
]


@pytest.mark.parametrize(("call", "words"), BAD)
def test_bad_input_gets_one_sentence(call, words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        call(*qkv())
    assert "\n" not in str(caught.value)


def test_the_probe_sees_an_operator_that_answers_wrongly(monkeypatch) -> None:
    flash_module.kernel.cache_clear()
    try:
        assert flash_module.kernel()
        flash_module.kernel.cache_clear()
        monkeypatch.setattr(
            flash_module.plain, "forward", lambda q, k, v, m, s: (q * 0, q[..., 0].float() * 0)
        )
        assert not flash_module.kernel()
    finally:
        flash_module.kernel.cache_clear()


def test_memory_of_a_relative_bias_does_not_grow_with_the_square() -> None:
    """The mask is a view: its storage is the strip of diagonals."""
    from attnbias.lowering.strided import hankel

    table = torch.randn(1, 8, 2 * 4096 - 1)
    mask = hankel(table, (1, 8), 4096, (0, 4096), (0, 4096))
    assert mask.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
    want = ab.Relative(table, queries=4096, keys=4096).dense()[0, 3, :5]
    assert torch.equal(mask[0, 3].flip(0)[:5], want)
