"""A row that sees no key gives output 0 and log-sum-exp minus infinity, in every lowering."""

from __future__ import annotations

import pytest
import torch

import attnbias as ab
from attnbias.lowering import LOWERINGS

N = 6  # queries and keys; every mask below hides all keys from some rows, and not from all


def masks() -> dict[str, ab.Bias]:
    hidden = torch.zeros(N)
    hidden[:] = -torch.inf
    rows = torch.ones(1, 1, N, N, dtype=torch.bool)
    rows[..., 2, :] = False
    return {
        "padding": ab.Padding(torch.tensor([[True] * N, [False] * N])),
        "left padding under a causal mask": ab.Padding(torch.arange(N) > 2) + ab.Causal(N, N),
        "key bias": ab.KeyBias(torch.stack([hidden, torch.zeros(N)])),
        "dense": ab.Dense(rows),
        "window past the end": ab.Window(0, None, queries=N, keys=N, offset=3),
        "causal, later keys": ab.Causal(N, N, offset=-2),
        "relative": ab.Relative(
            torch.where(torch.arange(2 * N - 1) < N + 1, -torch.inf, 0.5), queries=N, keys=N
        ),
    }


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", masks())
def test_empty_rows(name: str, lowering: str) -> None:
    bias = masks()[name]
    q, k, v = (torch.randn(2, 2, N, 4, requires_grad=True) for _ in range(3))
    empty = (bias.dense() == -torch.inf).all(-1).expand(2, 2, N)
    assert empty.any()
    assert not empty.all()
    try:
        out, lse = ab.attention(q, k, v, bias=bias, lowering=lowering, return_lse=True)
    except ab.Refused:
        offered = [low for low in LOWERINGS.values() if _offers(low.name, q, k, v, bias)]
        assert len(offered) >= 2
        return
    assert torch.equal(lse == -torch.inf, empty)
    assert not out[empty].any()
    assert out[~empty].abs().min() > 0
    # Merging such a part changes nothing where it is empty; gradients stay finite.
    other, other_lse = ab.attention(q, k, v, return_lse=True)
    joined, _ = ab.merge([(out, lse), (other, other_lse)])
    torch.testing.assert_close(joined[empty], other[empty])
    for grad in torch.autograd.grad(joined.sum() + lse[~empty].sum(), (q, k, v)):
        assert torch.isfinite(grad).all()


def _offers(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: ab.Bias) -> bool:
    offers = {offer.lowering: offer for offer in ab.explain(q, k, v, bias=bias).offers}
    return not offers[name].refused
