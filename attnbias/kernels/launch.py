"""From tensors to kernel arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnbias.kernels import configs
from attnbias.kernels.forward import forward


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
    """With contiguous rows."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def forward_pass(
    query: Tensor, key: Tensor, value: Tensor, scale: float, given: Given
) -> tuple[Tensor, Tensor]:
    """Output in the dtype of the query and log-sum-exp in float32; nothing may be empty."""
    query, key, value = rows_of(query), rows_of(key), rows_of(value)
    batch, heads, n, size = query.shape
    groups, m, width = value.shape[1:]
    out = query.new_empty(batch, heads, n, width)
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device)
    config = configs.choose("forward", query.dtype, size, width, given.rank)
    grid = (triton.cdiv(n, config.rows), batch * heads)
    kernel: Any = forward
    kernel[grid](
        query,
        key,
        value,
        out,
        lse,
        steps(query),
        steps(key),
        steps(value),
        steps(out),
        heads,
        heads // groups,
        n,
        m,
        size,
        width,
        scale,
        given.columns,
        given.terms,
        given.places,
        given.drop,
        KINDS=given.kinds,
        RANK=given.rank,
        BAND=given.band,
        RANGES=given.ranges,
        DROPS=given.drop is not None,
        PRECISION=config.precision,
        ROWS=config.rows,
        COLS=config.cols,
        SIZE=configs.power(size),
        WIDTH=configs.power(width),
        **config.options(),
    )
    return out, lse
