"""Packed sequences: each segment by itself, with whatever else the bias holds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias import native
from attnbias.lowering import LOWERINGS
from tests.cases.bias import agree


def ids_of(*lengths: int) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


# Query ids, key ids: (length) or (batch, length).
PACKED = {
    "one row for the batch": (ids_of(100, 70, 130), ids_of(100, 70, 130)),
    "a row each": (
        torch.stack([ids_of(100, 70, 130), ids_of(150, 150)]),
        torch.stack([ids_of(80, 40, 90), ids_of(200, 10)]),
    ),
    "keys for a row alone": (ids_of(150, 150), torch.stack([ids_of(99, 101), ids_of(150, 50)])),
    "keys in another order": (ids_of(140, 160), torch.cat([1 - ids_of(60, 80)])),
    "a segment without keys, and keys without queries": (
        torch.cat([ids_of(100), ids_of(200) + 7]),
        torch.cat([ids_of(50), ids_of(40) + 3]),
    ),
    "an id that comes back among the queries": (
        torch.cat([ids_of(90), ids_of(90) + 1, ids_of(90)]),
        ids_of(64, 64),
    ),
}


def answer(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    seen = (scores > -torch.inf).any(-1)
    safe = torch.where(seen[..., None], scores, 0.0)
    out = torch.where(seen[..., None], safe.softmax(-1), 0.0) @ v
    return out, torch.where(seen, safe.logsumexp(-1), -torch.inf)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", PACKED)
def test_values_and_gradients(name: str, kind: torch.dtype, causal: bool) -> None:
    queries, keys = PACKED[name]
    n, m = queries.shape[-1], keys.shape[-1]
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    given = [normal(2, 4, n, 8), normal(2, 2, m, 8), normal(2, 2, m, 5), normal(4, n + m - 1)]
    wide = [t.requires_grad_() for t in given]
    own = [t.detach().to(kind).requires_grad_() for t in given]

    i, j = torch.arange(n)[:, None], torch.arange(m)
    hidden = queries.reshape(-1, 1, n, 1) != keys.reshape(-1, 1, 1, m)
    if causal:
        hidden = hidden | (j > i + m - n)
    matrix = wide[3][:, j - i + n - 1].masked_fill(hidden, -torch.inf)
    want, want_lse = answer(*wide[:3], matrix)
    step, step_lse = normal(*want.shape), normal(*want_lse.shape)

    def total(out: Tensor, lse: Tensor) -> Tensor:
        return (out * step).sum() + (torch.where(lse > -torch.inf, lse, 0.0) * step_lse).sum()

    wanted = torch.autograd.grad(total(want, want_lse), wide)
    bias = ab.Relative(own[3], queries=n, keys=m) + ab.Segments(queries, keys)
    out, lse = ab.attention(*own[:3], bias=bias, causal=causal, lowering="packed", return_lse=True)
    limit = 1e-10 if kind == torch.float64 else 2e-5
    agree(out, want, limit, "output")
    agree(lse, want_lse, limit, "lse")
    for place, (got, need) in enumerate(
        zip(torch.autograd.grad(total(out, lse), own), wanted, strict=True)
    ):
        agree(got, need, 10 * limit, f"gradient {place}")
    if name != "keys in another order":
        without = answer(*wide[:3], matrix.masked_fill(hidden, 0.0))[0]
        assert float((without - want).detach().abs().max()) > 0.1


def test_long_segments_are_chosen_and_cost_what_they_see() -> None:
    ids = ids_of(*[512] * 8)
    q = torch.empty(1, 8, 4096, 64, device="meta")
    with native.disabled():
        plan = ab.explain(q, q, q, bias=ab.Segments(ids, ids), causal=True)
    assert plan.chosen == "packed"
    offers = {offer.lowering: offer for offer in plan.offers}
    assert offers["packed"].time < 0.25
    assert offers["packed"].operations * 8 == pytest.approx(offers["reference"].operations)


@pytest.mark.parametrize(
    ("bias", "words"),
    [
        (lambda n: ab.Window(5, 0, queries=n, keys=n), "no segments"),
        (lambda n: ab.Segments(torch.arange(n) % 2, torch.arange(n) % 2), "several ranges"),
        (lambda n: ab.Segments(torch.arange(n) // 9, torch.arange(n) // 9), "as many calls"),
        (
            lambda n: ab.Segments(ids_of(n), ids_of(n)) + ab.Segments(ids_of(n), ids_of(n)),
            "two kinds",
        ),
    ],
)
def test_what_is_refused(bias, words: str) -> None:
    q = torch.randn(1, 2, 200, 8)
    with pytest.raises(ab.Refused, match=words):
        ab.attention(q, q, q, bias=bias(200), lowering="packed")
    assert torch.isfinite(ab.attention(q, q, q, bias=bias(200))).all()


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 5), (5, 0)])
def test_empty(n: int, m: int) -> None:
    q, k = torch.randn(2, 2, n, 4), torch.randn(2, 2, m, 4)
    bias = ab.Segments(torch.zeros(n, dtype=torch.long), torch.zeros(m, dtype=torch.long))
    out, lse = ab.attention(q, k, k, bias=bias, lowering="packed", return_lse=True)
    assert out.shape == q.shape
    assert not out.any()
    assert bool((lse == -torch.inf).all())
    assert "packed" in LOWERINGS
