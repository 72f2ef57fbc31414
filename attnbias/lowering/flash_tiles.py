"""Calls of a GPU's fused operators: the rows and keys of each, and a mask that they can read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STEP = 8  # features, and entries of a row of a mask, come in steps of 16 bytes or more
UNITS = 65535  # batch elements that a grid of blocks can have
ENTRIES = 2**24  # of one copied tile of a mask: 64 MB


class Tile(NamedTuple):
    """Batch elements and rows of one call, keys up to which, its mask, and whether it is causal."""

    batch: slice
    rows: slice
    keys: int
    mask: Tensor | None
    causal: bool


def wide(tensor: Tensor) -> Tensor:
    """With head sizes and steps that the operators take."""
    missing = -tensor.shape[-1] % STEP
    if missing:
        return F.pad(tensor, (0, missing))
    steps = [s for s, n in zip(tensor.stride()[:3], tensor.shape, strict=False) if n > 1]
    even = tensor.stride(-1) == 1 and all(s % STEP == 0 for s in steps)
    return tensor if even and tensor.storage_offset() % STEP == 0 else tensor.contiguous().clone()


def tiles(query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> Iterator[Tile]:
    batch, heads, queries = query.shape[:3]
    keys = key.shape[2]
    for start in range(0, batch, UNITS):
        own = slice(start, min(start + UNITS, batch))
        count = own.stop - own.start
        part = None if mask is None else mask[own]
        if part is None:
            yield Tile(own, slice(0, queries), min(keys, queries) if causal else keys, None, causal)
            continue
        small = _collapsed(part).to(torch.float32)
        full = (count, heads, -1, keys)
        if _aligned(small):
            yield Tile(own, slice(0, queries), keys, _expanded(small, full, queries), causal)
            continue
        if small.shape[2] == 1:
            yield Tile(own, slice(0, queries), keys, _expanded(_copy(small), full, queries), causal)
            continue
        step = max(1, ENTRIES // (small.shape[0] * small.shape[1] * keys))
        for first in range(0, queries, step):
            rows = slice(first, min(first + step, queries))
            seen = min(keys, rows.stop) if causal else keys
            tile = _copy(small[:, :, rows, :seen])
            if causal:  # the operator counts rows from the first one of a call
                i = torch.arange(rows.start, rows.stop, device=tile.device)[:, None]
                tile.masked_fill_(torch.arange(seen, device=tile.device) > i, -torch.inf)
            whole = tile.expand(count, heads, -1, -1)
            yield Tile(own, rows, seen, whole, False)


def _collapsed(mask: Tensor) -> Tensor:
    """Without the dimensions that only repeat; the last one stays."""
    for dim in range(3):
        if mask.stride(dim) == 0 and mask.shape[dim] > 1:
            mask = mask.narrow(dim, 0, 1)
    if mask.shape[-1] > 1 and mask.stride(-1) == 0:
        mask = mask.contiguous()
    return mask


def _expanded(mask: Tensor, full: tuple[int, int, int, int], queries: int) -> Tensor:
    return mask.expand(full[0], full[1], queries, full[3])


def _aligned(mask: Tensor) -> bool:
    steps = [s for s, n in zip(mask.stride()[:3], mask.shape, strict=False) if n > 1]
    even = mask.stride(-1) == 1 and mask.storage_offset() % STEP == 0
    return even and all(s % STEP == 0 for s in steps)


def _copy(mask: Tensor) -> Tensor:
    """In rows that begin at a multiple of `STEP` entries."""
    wide = mask.shape[-1] + -mask.shape[-1] % STEP
    made = mask.new_empty(*mask.shape[:3], wide)[..., : mask.shape[-1]]
    return made.copy_(mask)


def without_a_key(mask: Tensor, causal: bool) -> Tensor:
    """``(batch | 1, heads | 1, queries)``: rows that see nothing. Memory O(rows), with a causal
    mask on top of one per entry, O(entries of a tile).
    """
    queries, small = mask.shape[2], _collapsed(mask)
    if not causal:
        return (small.amax(-1) == -torch.inf).expand(-1, -1, queries)
    rows = torch.arange(queries, device=mask.device)
    if small.shape[2] == 1:
        seen = small[:, :, 0] > -torch.inf
        first = torch.where(seen.any(-1), seen.int().argmax(-1), queries)
        return rows < first[..., None]
    keys = torch.arange(mask.shape[-1], device=mask.device)
    step = max(1, ENTRIES // (small.shape[0] * small.shape[1] * len(keys)))
    found = []
    for part in torch.split(rows, step):
        visible = small[:, :, part] > -torch.inf
        found.append(~(visible & (keys <= part[:, None])).any(-1))
    return torch.cat(found, -1)


def joined(parts: list[Tensor], tiles: list[Tile]) -> Tensor:
    """Rows side by side, then batch elements."""
    groups: dict[int, list[Tensor]] = {}
    for part, tile in zip(parts, tiles, strict=True):
        groups.setdefault(tile.batch.start, []).append(part)
    rows = [own[0] if len(own) == 1 else torch.cat(own, 2) for own in groups.values()]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 0)
