"""Whether a GPU's fused operators do what they should: each is compared with plain PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from attnbias.lowering import plain

LIMITS = {torch.float32: 5e-5, torch.float16: 6e-3, torch.bfloat16: 4e-2}  # of a largest entry


@functools.cache
def works(route: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether an operator agrees with plain PyTorch on this device: values, log-sum-exp, gradients,
    masks with a row that sees nothing, lengths of every remainder, both runs the same.
    """
    return _probed(route, dtype, device)


def _probed(route: str, dtype: torch.dtype, device: torch.device) -> bool:
    try:
        with torch.no_grad():
            return all(_agrees(route, dtype, device, *case) for case in _cases(route))
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False


def _cases(route: str) -> Iterator[tuple[int, int, str, bool]]:
    """``(queries, keys, mask, causal)``, lengths of many remainders modulo 128."""
    if route == "flash":
        yield from ((64, 192, "none", False), (1, 77, "none", False), (192, 192, "none", True))
        yield (70, 133, "none", True)
        return
    for mask in ("none", "row", "dense", "view"):
        yield from ((70, 77, mask, False), (192, 64, mask, False), (133, 70, mask, True))


def _agrees(
    route: str,
    dtype: torch.dtype,
    device: torch.device,
    queries: int,
    keys: int,
    mask: str,
    causal: bool,
) -> bool:
    from attnbias.lowering import flash_gpu

    gen = torch.Generator().manual_seed(queries)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen).to(device)

    query, grad = (draw(2, 4, queries, 20).to(dtype) for _ in range(2))
    key, value = (draw(2, 2, keys, 20).to(dtype) for _ in range(2))
    given = _mask(mask, draw, queries, keys)
    out, lse = flash_gpu.call_by(route, query, key, value, given, causal, 0.3)
    whole = torch.zeros(2, 4, queries, keys, device=device)
    whole = whole if given is None else whole + given
    if causal:
        late = torch.ones(queries, keys, dtype=torch.bool, device=device).triu_(1)
        whole = whole.masked_fill(late, -torch.inf)
    wide = [t.float() for t in (query, key, value)]
    q, k, v = wide
    want, want_lse = plain.forward(q, k, v, whole, 0.3)
    want_lse = want_lse.masked_fill(want_lse == -torch.inf, 0.0)
    delta = (grad.float() * want).sum(-1)
    wanted = plain.backward(q, k, v, whole, 0.3, want_lse, delta, grad.float())[:3]
    back = [
        flash_gpu.backward_by(route, grad, query, key, value, out, lse, given, causal, 0.3)
        for _ in range(2)
    ]
    same = all(torch.equal(a, b) for a, b in zip(*back, strict=True))
    pairs = zip((out, lse, *back[0]), (want, want_lse, *wanted), strict=True)
    limit = LIMITS[dtype]
    return same and all(
        float((a.float() - b).abs().max()) <= limit * max(1.0, float(b.abs().max()))
        for a, b in pairs
    )


def _mask(name: str, draw: Callable[..., Tensor], queries: int, keys: int) -> Tensor | None:
    full = (2, 4, queries, keys)
    if name == "none":
        return None
    if name == "row":
        row = draw(2, 1, 1, keys)
        row[..., 3:9] = -torch.inf
        return row.expand(full)
    if name == "view":  # a table of diagonals, each row one entry further on
        table = draw(4, queries + keys - 1)
        return table.as_strided((4, queries, keys), (table.shape[1], 1, 1))[None].expand(full)
    dense = draw(1, 4, queries, keys)
    dense[:, :, 5 % queries] = -torch.inf
    return dense.expand(full)
