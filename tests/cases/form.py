"""What every form must pass: subclass `FormCase`, build it small, say one entry in plain Python."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.lowering import LOWERINGS

Form = Callable[..., ab.Bias]

# Largest error over the largest entry (or 1): half formats round queries, keys and values.
TOLERANCE = {
    torch.float64: 1e-6,  # what the forms store is float32
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}
SIZES = [(7, 7, None), (3, 9, None), (9, 3, None), (1, 8, None), (1, 1, None), (5, 6, 4)]
LONG = 270  # beyond one block of queries of the lowerings


def close(got: Tensor, want: Tensor, limit: float) -> None:
    assert got.shape == want.shape
    error = float((got.detach().double() - want.detach()).abs().max()) if want.numel() else 0.0
    assert error <= limit * max(1.0, float(want.abs().max()) if want.numel() else 0.0)


class FormCase(ABC):
    """Inherited tests of a form with `heads` heads (an even number)."""

    heads = 4

    @abstractmethod
    def build(self) -> Form:
        """The form; the same one each time."""

    @abstractmethod
    def entry(self, head: int, query: int, key: int) -> float:
        """The bias between two positions, in plain Python, by another route than the form's."""

    def matrix(self, n: int, m: int, offset: int | None = None) -> Tensor:
        """``(1, heads, n, m)`` in float64, entry by entry."""
        start = m - n if offset is None else offset
        rows = [
            [[self.entry(h, start + i, j) for j in range(m)] for i in range(n)]
            for h in range(self.heads)
        ]
        return torch.tensor(rows, dtype=torch.float64).reshape(1, self.heads, n, m)

    def answer(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, causal: bool) -> Tensor:
        """Softmax attention in float64 with every matrix built; all rows see a key."""
        q, k, v = (t.double() for t in (q, k, v))
        k, v = (t.repeat_interleave(self.heads // t.shape[1], 1) for t in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
        if causal:
            n, m = scores.shape[-2:]
            late = torch.arange(m)[None] > torch.arange(m - n, m)[:, None]
            scores = scores.masked_fill(late, -torch.inf)
        return scores.softmax(-1) @ v

    def problem(self, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Two rows of a batch, half as many key heads as query heads."""
        draw = torch.Generator().manual_seed(n + m)
        shapes = [(self.heads, n), (self.heads // 2, m), (self.heads // 2, m)]
        q, k, v = (torch.randn(2, *shape, 8, generator=draw).to(dtype) for shape in shapes)
        return q, k, v

    @pytest.mark.parametrize(("n", "m", "offset"), SIZES)
    def test_dense_is_the_entries(self, n: int, m: int, offset: int | None) -> None:
        bias = self.build()(n, m, offset=offset)
        assert bias.shape == (1, self.heads, n, m)
        close(bias.dense().double(), self.matrix(n, m, offset), 1e-6)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("causal", [False, True])
    @pytest.mark.parametrize(("n", "m"), [(1, 1), (5, 5), (3, 11), (LONG, LONG)])
    def test_every_lowering_agrees(self, n: int, m: int, causal: bool, dtype: torch.dtype) -> None:
        bias, (q, k, v) = self.build()(n, m), self.problem(n, m, dtype)
        want = self.answer(q, k, v, self.matrix(n, m), causal)
        offered = 0
        for name in LOWERINGS:
            try:
                with torch.no_grad():
                    out = ab.attention(q, k, v, bias=bias, causal=causal, lowering=name)
            except ab.Refused:
                continue
            offered += 1
            close(out, want, TOLERANCE[dtype])
        assert offered >= 2
        if (n, m) == (LONG, LONG):
            # The bias matters: without it the same comparison fails.
            with torch.no_grad():
                without = ab.attention(q, k, v, causal=causal).double()
            assert float((without - want).abs().max()) > 3 * TOLERANCE[dtype] * float(
                want.abs().max()
            )

    @pytest.mark.parametrize("causal", [False, True])
    def test_gradients_to_query_key_and_value(self, causal: bool) -> None:
        leaves = [t.requires_grad_() for t in self.problem(6, 9, torch.float64)]
        bias, step = self.build()(6, 9).detach(), torch.randn(2, self.heads, 6, 8).double()
        want = torch.autograd.grad(
            (self.answer(*leaves, self.matrix(6, 9), causal) * step).sum(), leaves
        )
        for name in LOWERINGS:
            try:
                out = ab.attention(*leaves, bias=bias, causal=causal, lowering=name)
            except ab.Refused:
                continue
            for got, target in zip(
                torch.autograd.grad((out * step).sum(), leaves), want, strict=True
            ):
                close(got, target, 1e-5)

    def test_gradients_to_the_parameters(self) -> None:
        q, k, v = self.problem(4, 6, torch.float64)
        bias = self.build()(4, 6).detach()
        parameters = [p.double().requires_grad_() for p in bias.parameters()]
        assert parameters

        def run(*given: Tensor) -> Tensor:
            out = ab.attention(q, k, v, bias=bias.with_parameters(given), lowering="tiled")
            assert isinstance(out, Tensor)
            return out

        assert torch.autograd.gradcheck(run, parameters)

    def test_a_slice_is_the_form_at_an_offset(self) -> None:
        part = self.build()(12, 12)[..., 7:10, 0:10]
        assert type(part) is type(self.build()(3, 10))
        assert torch.equal(part.dense(), self.build()(3, 10).dense())
        close(part.dense().double(), self.matrix(3, 10), 1e-6)

    def test_decoding_equals_the_full_pass(self) -> None:
        q, k, v = self.problem(9, 9, torch.float32)
        whole = ab.attention(q, k, v, bias=self.build()(9), causal=True)
        step = ab.attention(q[:, :, 6:7], k[:, :, :7], v[:, :, :7], bias=self.build()(1, 7))
        close(step, whole[:, :, 6:7].double(), 1e-5)

    @pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0)])
    def test_empty_lengths(self, n: int, m: int) -> None:
        q, k, v = self.problem(n, m, torch.float32)
        out, lse = ab.attention(q, k, v, bias=self.build()(n, m), return_lse=True)
        assert out.shape == q.shape
        assert not out.any()
        assert bool((lse == -torch.inf).all())

    def test_joins_the_algebra(self) -> None:
        n, m = 5, 8
        bias, key = self.build()(n, m), torch.randn(m)
        keep = torch.arange(m) != 2
        total = 0.5 * self.matrix(n, m) + key.double()
        want = total.masked_fill(~keep, -torch.inf)
        got = bias * 0.5 + ab.KeyBias(key) + ab.Padding(keep)
        close(got.dense().exp().double(), want.exp(), 1e-5)
