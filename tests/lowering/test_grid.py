"""The lowerings of grids: lines of a grid as views, and windows that share one small bias."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnbias as ab
from attnbias import native
from attnbias.lowering import grid as lines
from attnbias.lowering import windows
from tests.cases.bias import agree
from tests.cases.drawn_grid import DRAWERS
from tests.cases.problems import Sizes
from tests.lowering.test_agreement import COMMON

OFFERED: Counter[str] = Counter()


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in float64 with every matrix built; empty rows are 0 and -inf."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    score = q.double() @ k.mT / math.sqrt(q.shape[-1]) + bias
    seen = (score > -torch.inf).any(-1)
    safe = torch.where(seen[..., None], score, 0.0)
    out = torch.where(seen[..., None], safe.softmax(-1), 0.0) @ v
    return out, torch.where(seen, safe.logsumexp(-1), -torch.inf)


@st.composite
def grids(draw: st.DrawFn):
    b, groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    h = groups * group
    n, m = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    bb, hh = draw(st.sampled_from([1, b])), draw(st.sampled_from([1, h]))
    kind = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    real = torch.float64 if kind == torch.float64 else torch.float32
    drawn = DRAWERS["grid"](draw, Sizes(b, h, n, m, bb, hh, real, gen))
    wide = draw(st.sampled_from([4, 4, 3, 7]))
    q, k, v = (
        torch.randn(b, heads, count, d, generator=gen).to(kind)
        for heads, count, d in ((h, n, 4), (groups, m, 4), (groups, m, wide))
    )
    return drawn, q, k, v


@settings(max_examples=250, **COMMON)
@given(grids(), st.sampled_from([2**22, 40]))
def test_lines_and_windows_agree_with_every_matrix_built(case, entries: int) -> None:
    """Also with tables of a few entries at once, as on a large grid."""
    (bias, matrix, params), q, k, v = case
    want, want_lse = dense(q, k, v, matrix([p.double() for p in params]))
    limit = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2}[q.dtype]
    kept, lines.ENTRIES = lines.ENTRIES, entries
    try:
        for name in ("grid", "windows"):
            try:
                out, lse = ab.attention(q, k, v, bias=bias, lowering=name, return_lse=True)
            except ab.Refused:
                OFFERED[f"{name} refused"] += 1
                continue
            OFFERED[name] += 1
            agree(out, want, limit, name)
            agree(lse, want_lse, max(limit, 1e-11), name)
    finally:
        lines.ENTRIES = kept


def test_the_problems_reach_both() -> None:
    if not OFFERED:
        test_lines_and_windows_agree_with_every_matrix_built()
    assert OFFERED["grid"] > 60
    assert OFFERED["windows"] > 60


@pytest.mark.parametrize("lowering", ["grid", "windows"])
@pytest.mark.parametrize("specials", [False, True])
def test_gradients(lowering: str, specials: bool) -> None:
    size = (5, 4)
    values = normal(1, 2, 2, 2, seed=9).requires_grad_() if specials else None
    table = normal(2, 9, 7, seed=1).requires_grad_()
    n = 21 if specials else 20
    q, k, v = (normal(3, 2, n, 4, seed=s).requires_grad_() for s in (2, 3, 4))
    bias = ab.GridRelative(table, size, specials=values)
    leaves = [q, k, v, table] + ([values] if values is not None else [])
    out, lse = ab.attention(q, k, v, bias=bias, lowering=lowering, return_lse=True)
    step = normal(*out.shape, seed=5)
    got = torch.autograd.grad((out * step).sum() + lse.square().sum(), leaves)
    want_out, want_lse = dense(q, k, v, bias.dense())
    want = torch.autograd.grad((want_out * step).sum() + want_lse.square().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        agree(a, b, 1e-10)
    # The query alone, and the table alone.
    for place in (0, 3):
        (one,) = torch.autograd.grad(
            (
                ab.attention(
                    *(t if x == place else t.detach() for x, t in enumerate((q, k, v))),
                    bias=bias if place == 3 else bias.detach(),
                    lowering=lowering,
                )
                * step
            ).sum(),
            leaves[place],
        )
        (need,) = torch.autograd.grad((dense(q, k, v, bias.dense())[0] * step).sum(), leaves[place])
        agree(one, need, 1e-10)


def test_gradients_of_windows_with_a_shift() -> None:
    table = normal(9, 2, seed=1).requires_grad_()
    q, k, v = (normal(8, 2, 4, 4, seed=s).requires_grad_() for s in (2, 3, 4))
    bias = ab.forms.Swin(2, 2, table=table)((4, 4), shift=1, images=2)
    out = ab.attention(q, k, v, bias=bias, lowering="windows")
    assert isinstance(out, Tensor)
    step = normal(*out.shape, seed=5)
    got = torch.autograd.grad((out * step).sum(), [q, k, v, table])
    want = torch.autograd.grad((dense(q, k, v, bias.dense())[0] * step).sum(), [q, k, v, table])
    for a, b in zip(got, want, strict=True):
        agree(a, b, 1e-10)


@pytest.mark.parametrize("entries", [2**20, 70, 10])
def test_kinds_of_windows_in_any_order(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """Ids that differ from row to row, one call for few windows, one for many."""
    monkeypatch.setattr(windows, "ENTRIES", entries)
    bias = ab.GridRelative(normal(2, 5, 3), (3, 2))
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (7, 6), generator=draw)
    other = torch.randint(0, 3, (1, 6), generator=draw)
    total = bias + ab.Segments(ids, other) + ab.KeyBias(normal(6, seed=8))
    q, k, v = (normal(7, 2, 6, 4, seed=s) for s in (2, 3, 4))
    out, lse = ab.attention(q, k, v, bias=total, lowering="windows", return_lse=True)
    want, want_lse = dense(q, k, v, total.dense())
    agree(out, want, 1e-12)
    agree(lse, want_lse, 1e-12)
    assert bool((want_lse == -torch.inf).any()), "some row must see nothing"


def test_lines_build_no_square() -> None:
    """What is made at once for a large grid is far below its pairs."""
    n = 96 * 96
    bias = ab.GridRelative(torch.randn(1, 191, 191), (96, 96))
    sizes = [table.numel() for _, table in lines._tables(bias, [0, 1], torch.float32, 1)]
    assert max(sizes) <= lines.ENTRIES
    assert sum(sizes) == 96 * 191 * 96
    assert sum(sizes) < n * n / 40


@pytest.mark.parametrize(
    ("bias", "name", "words"),
    [
        (ab.GridRelative(torch.randn(9), (5,)) + ab.KeyBias(torch.randn(5)), "grid", "one table"),
        (ab.KeyBias(torch.randn(5)), "grid", "one table"),
        (ab.KeyBias(torch.randn(5)), "windows", "no table on a grid"),
        (
            ab.GridRelative(torch.randn(11, 13), (3, 4), (3, 4))[..., 1:6, 2:7],
            "grid",
            "no whole grid",
        ),
        (
            ab.GridRelative(torch.randn(30), (5,), (5,), key_stride=2),
            "grid",
            "do not divide",
        ),
        (
            ab.GridRelative(torch.randn(9), (5,)) + ab.Dense(torch.randn(2, 1, 5, 5)),
            "windows",
            "differs from window to window",
        ),
    ],
)
def test_refusals(bias: ab.Bias, name: str, words: str) -> None:
    q = torch.randn(2, 1, 5, 4)
    with pytest.raises(ab.Refused, match=words):
        ab.attention(q, q, q, bias=bias, lowering=name)


def test_windows_refuse_what_is_long() -> None:
    bias = ab.GridRelative(torch.randn(79, 79), (40, 40))
    q = torch.empty(1, 1, 1600, 8, device="meta")
    offers = {o.lowering: o for o in ab.explain(q, q, q, bias=bias).offers}
    assert offers["windows"].refused
    assert "too many" in offers["windows"].reason
    assert not offers["grid"].refused


def test_the_planner_takes_windows_for_a_batch_and_lines_for_an_image() -> None:
    bias = ab.forms.Swin(3)((56, 56), shift=3)
    q = torch.empty(64, 3, 49, 32, device="meta")
    assert ab.explain(q, q, q, bias=bias).chosen == "windows"
    large = ab.GridRelative(torch.randn(8, 127, 127), (64, 64))
    q = torch.empty(1, 8, 4096, 64, device="meta")
    with native.disabled():
        assert ab.explain(q, q, q, bias=large).chosen == "grid"
