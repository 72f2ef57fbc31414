"""Gradients of the kernels beside those of the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Make = Callable[..., Bias | None]


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def problem(
    n: int, m: int, heads: int = 2, groups: int = 2, size: int = 20, width: int = 24, batch: int = 1
) -> list[Tensor]:
    """Query, key and value; scores are sharp enough that what is left out shows."""
    query, key = 2.0 * draw(batch, heads, n, size), draw(batch, groups, m, size)
    return [query, key, draw(batch, groups, m, width)]


def gradients(
    given: Sequence[Tensor],
    make: Make,
    parameters: Sequence[Tensor] = (),
    *,
    lowering: str = "triton",
    kind: torch.dtype | None = None,
    lse: bool = True,
    out: bool = True,
    wanted: Sequence[bool] = (True, True, True),
    **options: Any,
) -> list[Tensor | None]:
    """Of a sum with fixed random weights, to query, key, value and the parameters.

    kind: the dtype to compute in; out, lse: what the sum is of (log-sum-exp where it is finite).
    """
    leaves = [
        t.detach().to(kind or t.dtype).requires_grad_(w) for t, w in zip(given, wanted, strict=True)
    ]
    own = [t.detach().to(kind or t.dtype).requires_grad_() for t in parameters]
    if "dropout" in options:
        options["generator"] = torch.Generator().manual_seed(5)
    made, logs = ab.attention(
        *leaves, bias=make(*own), lowering=lowering, return_lse=True, **options
    )
    rng = torch.Generator().manual_seed(7)
    one, two = (torch.randn(t.shape, generator=rng).to(t.device) for t in (made, logs))
    total = torch.zeros((), dtype=logs.dtype, device=logs.device)
    if out:
        total = total + (made * one.to(given[0].dtype).to(made.dtype)).to(logs.dtype).sum()
    if lse:
        seen = logs.isfinite()
        total = total + (logs[seen] * two[seen].to(logs.dtype)).sum()
    every = [t for t in leaves if t.requires_grad] + own
    found = iter(torch.autograd.grad(total, every, allow_unused=True))
    return [next(found) if t.requires_grad else None for t in [*leaves, *own]]


def assert_gradients(
    given: Sequence[Tensor],
    make: Make,
    parameters: Sequence[Tensor] = (),
    *,
    near: float = 3e-6,
    bare: bool = True,
    **options: Any,
) -> list[Tensor | None]:
    """Agree with those of the reference, relative to the largest of a tensor; with `bare`, those
    to the query would not without the bias.
    """
    found = gradients(given, make, parameters, **options)
    options["lowering"] = "reference"
    want = gradients(given, make, parameters, kind=torch.float64, **options)
    for made, right in zip(found, want, strict=True):
        if made is None:
            assert right is None
            continue
        right = torch.zeros_like(made) if right is None else right
        assert made.shape == right.shape
        assert bool(made.isfinite().all())
        scale = float(right.abs().amax()) if right.numel() else 1.0
        torch.testing.assert_close(
            made.double(), right, atol=near * max(scale, 1e-3), rtol=0, check_dtype=False
        )
    if bare and want[0] is not None:
        other = gradients(given, lambda *_: None, kind=torch.float64, **options)[0]
        assert other is not None
        assert (other - want[0]).abs().max() > 100 * near * want[0].abs().max()
    return found
