"""The gradient of a table from that of its entries: ``g[t]`` is the sum of ``ds[i, j]`` where
``rows[i] + cols[j] = t``, without atomics.

Every place of the table asks each query which key, if any, meets it there: a program owns places
and walks queries.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES, QUERIES = 256, 16  # of a tile
CHUNKS = 64  # of the queries at most, each with a table of its own, summed after


@triton.jit
def sums(
    ds, rows, keys, out, unit_step, row_step, n, m, count, lowest, wide, chunk,
    QUERIES: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """ds ``(units, n, m)``, rows ``(n)``: the share of each query in a place; keys ``(wide)``: the
    key whose share is ``lowest + position``, or -1; out ``(units, chunks, count)``.
    """
    blocks = tl.cdiv(count, PLACES)
    place = tl.program_id(0) % blocks * PLACES + tl.arange(0, PLACES)
    number = tl.program_id(0) // blocks
    chunks = tl.cdiv(n, chunk)
    unit = (number // chunks).to(tl.int64)
    first = number % chunks * chunk
    last = tl.minimum(first + chunk, n)
    found = tl.zeros((PLACES,), tl.float32)
    for start in range(first, last, QUERIES):
        i = start + tl.arange(0, QUERIES)
        im = i < last
        at = place[None, :] - tl.load(rows + i, mask=im, other=0)[:, None] - lowest
        j = tl.load(keys + at, mask=(at >= 0) & (at < wide) & im[:, None], other=-1)
        line = unit * unit_step + i.to(tl.int64)[:, None] * row_step
        found += tl.sum(tl.load(ds + line + j, mask=j >= 0, other=0.0), 0)
    tl.store(out + number.to(tl.int64) * count + place, found, mask=place < count)


def table_sums(ds: Tensor, rows: Tensor, cols: Tensor, entries: int) -> Tensor:
    """``(batch, heads, n, m)`` float32 to ``(batch, heads, entries)``.

    rows ``(batch | 1, n)``, cols ``(batch | 1, m)`` integers; no key of a batch element may have
    the same number as another one (`distinct` makes it so).
    """
    batch, heads, n, m = ds.shape
    out = ds.new_zeros(batch, heads, entries)
    if ds.numel() == 0 or entries == 0:
        return out
    apart = max(rows.shape[0], cols.shape[0])
    if apart > 1:
        for b in range(batch):
            own, key = (t[b if t.shape[0] > 1 else 0][None] for t in (rows, cols))
            out[b] = table_sums(ds[b : b + 1], own, key, entries)[0]
        return out
    ds = ds.contiguous()
    ds, key = distinct(ds, cols[0])
    m = ds.shape[-1]
    lowest, highest = int(key.min()), int(key.max())
    keys = torch.full((highest - lowest + 1,), -1, dtype=torch.int32, device=ds.device)
    keys[key.long() - lowest] = torch.arange(m, dtype=torch.int32, device=ds.device)
    chunk = max(QUERIES, triton.cdiv(n, CHUNKS))
    chunks = triton.cdiv(n, chunk)
    made = ds.new_empty(batch * heads, chunks, entries)
    kernel: Any = sums
    kernel[(triton.cdiv(entries, PLACES) * batch * heads * chunks,)](
        ds,
        rows[0].int().contiguous(),
        keys,
        made,
        n * m,
        m,
        n,
        m,
        entries,
        lowest,
        len(keys),
        chunk,
        QUERIES=QUERIES,
        PLACES=PLACES,
    )
    return made.sum(1).view(batch, heads, entries)


def distinct(ds: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of one number as one key, by a product with zeros and ones: a fixed order."""
    values, place = torch.unique(cols, return_inverse=True)
    if len(values) == len(cols):
        return ds, cols
    pick = torch.nn.functional.one_hot(place, len(values)).to(ds.dtype)
    return ds @ pick, values


__all__ = ["table_sums"]
