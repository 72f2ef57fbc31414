"""Factors of a `LowRank` as columns that the kernels multiply, and how exact that is.

Under half-precision queries the product of the factors is made in bfloat16, whose range is that of
float32: a factor is split, ``u = u1 + u2 (+ u3)``, and every product of parts that matters is a
column (`attnbias.lowering.columns`). With ``reach = max_i |u_i| max_j |v_j|`` an entry errs by at
most

.. math:: (3 \\cdot 2^{-16} + \\sqrt{3 R + 4}\\, 2^{-24})\\, \\mathrm{reach}
          \\quad\\text{(two parts)}, \\qquad
          (6 \\cdot 2^{-24} + \\sqrt{6 R + 4}\\, 2^{-24})\\, \\mathrm{reach}
          \\quad\\text{(three parts)}

Two parts are taken where that is within what the format of the queries rounds in a weight, else
three, which are as exact as products of float32, or nearer, than three of TF32. Where these need
more than `WIDEST` columns the factors stay in float32.
"""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor

from attnbias.kernels.configs import power
from attnbias.kernels.forward import Columns
from attnbias.lowering.columns import LIMITS, left_out, products, split
from attnbias.lowering.triton_terms import steps

WIDEST = 64  # columns of parts
KIND = torch.bfloat16

# By memory: a bias is made anew, and detached, around the same factors.
_known: Any = weakref.WeakKeyDictionary()


def columns(
    factors: list[tuple[Tensor, Tensor]], kind: torch.dtype, device: torch.device, *, parts: bool
) -> tuple[Columns | None, int]:
    """What the kernels read of factors, side by side in their order, and how many columns it is.

    kind: the format of the queries. parts: split them where that format is a half one; otherwise,
    as the backward pass wants it, column r of all is column r here, in float32.
    """
    factors = [(u, v) for u, v in factors if u.shape[-1]]
    if not factors:
        return None, 0
    number = count(factors, kind) if parts else 0
    left, right = (_beside([pair[side] for pair in factors], device) for side in (0, 1))
    if number:
        pieces = [split(t, KIND, number) for t in (left, right)]
        pairs = products(number)
        left, right = (
            torch.cat([piece[pair[side]] for pair in pairs], -1)
            for side, piece in enumerate(pieces)
        )
    rank = power(left.shape[-1])
    left, right = (_padded(t, rank) for t in (left, right))
    return Columns(*(left, *steps(left, 3), right, *steps(right, 3))), rank


def count(factors: list[tuple[Tensor, Tensor]], kind: torch.dtype) -> int:
    """Parts of a factor; 0: it stays in float32."""
    if kind not in (torch.float16, torch.bfloat16):
        return 0
    rank = sum(u.shape[-1] for u, _ in factors)
    two, three = (power(rank * len(products(parts))) for parts in (2, 3))
    if two < three and two <= WIDEST and bound(factors, 2) <= LIMITS[kind]:
        return 2
    return 3 if three <= WIDEST else 0


def bound(factors: list[tuple[Tensor, Tensor]], parts: int) -> float:
    """Bound of the error of an entry."""
    rank = sum(u.shape[-1] for u, _ in factors)
    rounding = math.sqrt(rank * len(products(parts)) + 4) * 2.0**-24
    reach = sum(_size(u) * _size(v) for u, v in factors)
    return (left_out(KIND, parts) + rounding) * reach


def _size(tensor: Tensor) -> float:
    """The largest norm of a row: found once for what is stored, as it waits for the device."""
    if tensor.is_inference():  # does not count its changes
        return _largest(tensor)
    part = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
    kept = _known.setdefault(tensor.untyped_storage(), {})
    if part not in kept or kept[part][0] != tensor._version:
        kept[part] = (tensor._version, _largest(tensor))
    found: float = kept[part][1]
    return found


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().norm(dim=-1).amax()) if tensor.numel() else 0.0


def _beside(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Columns side by side in float32, with the batch and heads of all."""
    found = [t.detach().to(device, torch.float32) for t in tensors]
    if len(found) == 1:
        return found[0]
    size = [max(t.shape[d] for t in found) for d in (0, 1)]
    return torch.cat([t.expand(*size, *t.shape[2:]) for t in found], -1)


def _padded(tensor: Tensor, rank: int) -> Tensor:
    tensor = torch.nn.functional.pad(tensor, (0, rank - tensor.shape[-1]))
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


__all__ = ["bound", "columns", "count"]
