"""Every lowering that offers agrees with an entry-by-entry float64 answer: values and gradients."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor

import attnbias as ab
from attnbias import native
from attnbias.lowering import LOWERINGS
from tests.cases.problems import Case, problems

# Largest error over the largest entry (or 1): outputs, then gradients. Half formats round
# the inputs of each product, so their gradients carry a few units of the format.
TOLERANCE = {
    torch.float64: (1e-11, 1e-10),
    torch.float32: (2e-5, 1e-4),
    torch.bfloat16: (3e-2, 8e-2),
    torch.float16: (4e-3, 1.5e-2),
}
SEEN: Counter[str] = Counter()


def _close(name: str, got: Tensor, want: Tensor, limit: float, size: float = 1.0) -> None:
    assert got.shape == want.shape, (name, got.shape, want.shape)
    got, want = got.detach().double(), want.detach().double()
    assert torch.equal(got == -torch.inf, want == -torch.inf), f"{name}: empty rows differ"
    finite = want > -torch.inf
    if finite.any():
        error = (got - want)[finite].abs().max()
        bound = limit * max(size, float(want[finite].abs().max()))
        assert error <= bound, f"{name}: {error:.2e} over {bound:.2e}"


def _grads(out: Tensor, lse: Tensor, weight: Tensor, weight_lse: Tensor, leaves: list[Tensor]):
    seen = lse > -torch.inf
    total = (out.double() * weight).sum()
    total = total + (torch.where(seen, lse, 0.0).double() * weight_lse).sum()
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def _check(case: Case) -> None:
    kind = case.query.dtype
    limit, limit_grad = TOLERANCE[kind]
    want, want_lse, leaves, params = case.answer()
    gen = torch.Generator().manual_seed(1)
    weight = torch.randn(want.shape, generator=gen, dtype=torch.float64)
    weight_lse = torch.randn(want_lse.shape, generator=gen, dtype=torch.float64)
    want_grads = (
        _grads(want, want_lse, weight, weight_lse, leaves + params)
        if want.requires_grad
        else [torch.zeros_like(t) for t in leaves + params]
    )
    for name in LOWERINGS:
        for with_bias in (False, True):
            q, k, v = (t.clone().requires_grad_() for t in (case.query, case.key, case.value))
            bias, own = case.bias, []
            if bias is not None:
                own = [p.detach().clone().requires_grad_(with_bias) for p in bias.parameters()]
                bias = bias.with_parameters(own)
            if with_bias and not own:
                continue
            try:
                out, lse = ab.attention(
                    q,
                    k,
                    v,
                    bias=bias,
                    causal=case.causal,
                    offset=case.offset,
                    sink=case.sink,
                    lowering=name,
                    return_lse=True,
                )
            except ab.Refused:
                SEEN[f"{name} refused"] += 1
                continue
            SEEN[name + (" with gradient to the bias" if with_bias else "")] += 1
            _close(f"{name} output", out, want, limit)
            _close(f"{name} lse", lse, want_lse, limit)
            wanted = [q, k, v] + (own if with_bias else [])
            grads = _grads(out, lse, weight, weight_lse, wanted)
            words = ["query", "key", "value"] + ["bias"] * len(own)
            targets = list(want_grads[:3])
            if with_bias:
                # Like structures merge when they are added: compare the sum of their gradients by
                # pulling both back to the terms as drawn is not possible, so only unmerged ones.
                if [tuple(p.shape) for p in own] != [tuple(p.shape) for p in params]:
                    grads, words = grads[:3], words[:3]
                else:
                    targets += list(want_grads[3:])
            for word, got, target in zip(words, grads, targets, strict=False):
                # A float32 table under float64 queries gets its gradient in float32.
                rounding = 1e-5 if got.dtype == torch.float32 else 0.0
                size, more = 1.0, 1.0
                if word == "bias":
                    # The gradient of one factor is a sum over hundreds of keys, weighted by the
                    # other factor: columns of positions count to hundreds, and what they weigh
                    # cancels.
                    values = [p.detach().nan_to_num(posinf=0.0, neginf=0.0).abs() for p in own]
                    large = max([1.0, *(float(one.max()) for one in values if one.numel())])
                    size, more = max(1.0, large / 4), 4.0 if large > 16 else 1.0
                limit_here = more * max(limit_grad, rounding)
                _close(f"{name} gradient to {word}", got, target, limit_here, size)


COMMON = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


# Four parts, so that two processes share the work: 2,000 problems in all.
@settings(max_examples=600, **COMMON)
@given(problems([torch.float64]))
def test_float64(case: Case) -> None:
    _check(case)


@settings(max_examples=600, **COMMON)
@given(problems([torch.float32]))
def test_float32(case: Case) -> None:
    _check(case)


@settings(max_examples=400, **COMMON)
@given(problems([torch.bfloat16]))
def test_bfloat16(case: Case) -> None:
    _check(case)


@settings(max_examples=400, **COMMON)
@given(problems([torch.float16]))
def test_float16(case: Case) -> None:
    _check(case)


@settings(max_examples=80, **COMMON)
@given(problems([torch.float32, torch.float64]))
def test_without_the_fused_operator(case: Case) -> None:
    """Where PyTorch lacks the operator the plain fallback takes its place."""
    from attnbias.lowering import flash

    present = flash.kernel
    flash.kernel = lambda: False
    try:
        _check(case)
    finally:
        flash.kernel = present


@settings(max_examples=100, **COMMON)
@given(problems([torch.float64, torch.float32]))
def test_with_tiny_tiles(case: Case) -> None:
    """Tiles of a few rows and single heads, blocks of a few queries: as at great length."""
    from attnbias.lowering import nest, strided, tiled

    with pytest.MonkeyPatch.context() as patch:
        for module, name, size in [
            (tiled, "ENTRIES", 64),
            (strided, "BLOCK", 3),
            (strided, "ROWS", 5),
            (strided, "SUPER", 9),
            (nest, "ROWS", 20),
            (nest, "COLS", 35),
            (nest, "ENTRIES", 1500),
        ]:
            patch.setattr(module, name, size)
        _check(case)


@settings(max_examples=150, **COMMON)
@given(problems([torch.float32, torch.bfloat16]))
def test_without_the_compiled_loops(case: Case) -> None:
    with native.disabled():
        _check(case)


@pytest.mark.parametrize("name", ["sdpa", "strided", "tiled", "stream", "reference"])
def test_the_problems_reach_every_lowering(name: str) -> None:
    """A test that only ever saw refusals would prove nothing."""

    @settings(max_examples=60, **COMMON)
    @given(problems([torch.float64]))
    def some(case: Case) -> None:
        _check(case)

    before = SEEN[name]
    some()
    assert SEEN[name] > before + 5
