"""From tensors to kernel arguments."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbias.kernels import configs, points_configs
from attnbias.kernels.decode import decode_pass, few
from attnbias.kernels.forward import forward

LOG2E = math.log2(math.e)
FARTHEST = 2**23  # elements from row to row: rows of a tile are addressed in 32 bits


@dataclass(frozen=True)
class Given:
    """What a problem adds to the scores, in the form that kernels read.

    terms and kinds: see `attnbias.kernels.terms`; columns: `forward.Columns` or None, `rank` of
    them; places: `places.Places`, band and ranges: its constants; drop: `pattern.Drop` or None.
    """

    terms: tuple[Any, ...]
    kinds: tuple[Any, ...]
    columns: Any
    rank: int
    places: Any
    band: int
    ranges: bool
    drop: Any


def steps(tensor: Tensor) -> tuple[int, int, int]:
    """Steps of batch, head and row; the last dimension is contiguous."""
    batch, head, row, last = tensor.stride()
    if last != 1 and tensor.shape[3] > 1:
        raise AssertionError("the last dimension must be contiguous")
    return batch, head, row


def rows_of(tensor: Tensor) -> Tensor:
    """With contiguous rows, not too far from one another: any view of heads is taken as it is."""
    fits = tensor.stride(-1) == 1 or tensor.shape[-1] == 1
    near = tensor.stride(2) < FARTHEST or tensor.shape[2] == 1
    return tensor if fits and near else tensor.contiguous()


def device_of(tensor: Tensor) -> Any:
    """A context in which kernels run on the device of a tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def forward_pass(
    query: Tensor, key: Tensor, value: Tensor, scale: float, given: Given
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of the query and log-sum-exp in float32; lengths may be 0."""
    batch, heads, n = query.shape[:3]
    out = query.new_empty(batch, heads, n, value.shape[3])
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device)
    if out.numel() == 0 or key.shape[2] == 0:
        # Without values there is still a log-sum-exp, which one feature of zeros brings.
        if lse.numel() and key.shape[2]:
            feature = value.new_zeros(*value.shape[:3], 1)
            return out, forward_pass(query, key, feature, scale, given)[1]
        return out.zero_(), lse.fill_(-torch.inf)
    query, key, value = rows_of(query), rows_of(key), rows_of(value)
    with device_of(query):
        split = few(query, key, given)
        if split is None:
            _forward(query, key, value, out, lse, scale, given)
        else:
            strides = (steps(query), steps(key), steps(value))
            known = constants(query, value, scale, given)
            decode_pass(query, key, value, out, lse, strides, scale, given, split, known)
    return out, lse


def constants(query: Tensor, value: Tensor, scale: float, given: Given) -> dict[str, Any]:
    """What `forward` and `decode` are compiled for, and the unit of their scores."""
    size, width = query.shape[3], value.shape[3]
    chains = given.rank > 0 and scale > 0.0 and _divides(given.columns.left, scale)
    folds = scale > 0.0 and not given.kinds and (chains or given.rank == 0)
    one, more = configs.halves(size)
    wide, wider = configs.halves(width)
    return {
        "unit": scale * LOG2E if folds else LOG2E,
        "size": size,
        "width": width,
        "KINDS": given.kinds,
        "RANK": given.rank,
        "BAND": given.band,
        "RANGES": given.ranges,
        "DROPS": given.drop is not None,
        "FOLDS": folds,
        "CHAINS": chains,
        "SIZE": one,
        "SIZE_MORE": more,
        "WIDTH": wide,
        "WIDTH_MORE": wider,
    }


def _divides(left: Tensor, scale: float) -> bool:
    """Whether columns can be divided by the scale without losing what they are split for."""
    return left.dtype == torch.float32 or math.frexp(scale)[0] == 0.5


def _shared(given: Given, batch: int) -> bool:
    """Whether batch elements read the same entries of a matrix."""
    pairs = zip(given.kinds, given.terms, strict=True)
    return batch > 1 and any(k == "whole" and t.batch == 0 for k, t in pairs)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    given: Given,
) -> None:
    batch, heads, n, size = query.shape
    groups, m, width = value.shape[1:]
    tiles = sum(configs.weight(kind) for kind in given.kinds) + (given.drop is not None)
    config = configs.choose("forward", query.dtype, size, width, given.rank, tiles)
    config = points_configs.fitting(config, given.kinds)
    kernel: Any = forward
    kernel[(triton.cdiv(n, config.rows) * batch * heads,)](
        query,
        key,
        value,
        out,
        lse,
        steps(query),
        steps(key),
        steps(value),
        steps(out),
        batch,
        heads,
        heads // groups,
        n,
        m,
        scale,
        columns=given.columns,
        terms=given.terms,
        places=given.places,
        drop=given.drop,
        **constants(query, value, scale, given),
        PRECISION=config.precision,
        BATCH_FAST=_shared(given, batch),
        ROWS=config.rows,
        COLS=config.cols,
        CHUNK=config.chunk,
        **config.options(),
    )
