"""Statistics of the map of one call: from tensors to the kernels of `statistics`, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from attnbias import kernels
from attnbias.kernels import configs
from attnbias.kernels.launch import Given, rows_of, steps
from attnbias.kernels.statistics import MEANS, Along, Sums, normalise, statistics

WIDEST = 4  # features that one pass takes
LINES = 1 << 26  # bytes of columns' sums that are always granted


@dataclass(frozen=True)
class Wanted:
    """What to find. received: the sum of each column. inner: ``sum p (lse - s)`` of each row. gap:
    ``sum p |query_positions - key_positions|``, positions ``(batch, queries)`` and ``(batch,
    keys)``. top: how many of the largest weights of each row. features: ``(batch, keys, F)``, of
    which ``sum p f`` is found.
    """

    received: bool = True
    inner: bool = False
    gap: bool = False
    top: int = 0
    features: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None


@dataclass(frozen=True)
class Found:
    """received ``(batch, heads, keys)``, inner, gap ``(batch, heads, queries)`` and means ``(..,
    queries, F)`` in float64; weight and place ``(.., queries, top)``, largest first, place -1 where
    no key is left; None for what was not wanted.
    """

    received: Tensor | None
    inner: Tensor | None
    gap: Tensor | None
    weight: Tensor | None
    place: Tensor | None
    means: Tensor | None


def log_sum_exp(query: Tensor, key: Tensor, scale: float, given: Given) -> Tensor:
    """``(batch, heads, queries)`` float32; minus infinity where no key is seen."""
    query, key = rows_of(query), rows_of(key)
    batch, heads, n, _ = query.shape
    lse = torch.empty(batch, heads, n, dtype=torch.float32, device=query.device)
    tiles = config(query, given)
    kernel: Any = normalise
    kernel[(triton.cdiv(n, tiles.rows) * batch * heads,)](
        query, key, lse, *_shared(query, key, scale, given), **_constants(query, given, tiles)
    )
    return lse


def statistics_pass(
    query: Tensor, key: Tensor, lse: Tensor, scale: float, given: Given, wanted: Wanted
) -> Found:
    """One pass over the map, and one more for every 4 features beyond the first 4.

    query, key: in float32 or a half format, whose products are exact in float32. lse ``(batch,
    heads, queries)`` float32: the normaliser of each row, plus infinity for a row that does not
    count. Memory beside what is found: a line of the keys for each program, as many bytes as query
    and key have, or 64 MB.
    """
    if wanted.features is None:
        return _one_pass(query, key, lse, scale, given, wanted)
    means = []
    first: Found | None = None
    for part in wanted.features.split(WIDEST, -1):
        asked = replace(wanted, features=part) if first is None else Wanted(False, features=part)
        found = _one_pass(query, key, lse, scale, given, asked)
        first = first or found
        assert found.means is not None
        means.append(found.means)
    assert first is not None
    return replace(first, means=torch.cat(means, -1))


def _one_pass(
    query: Tensor, key: Tensor, lse: Tensor, scale: float, given: Given, wanted: Wanted
) -> Found:
    query, key = rows_of(query), rows_of(key)
    batch, heads, n, _ = query.shape
    units, m, device = batch * heads, key.shape[2], query.device
    tiles = config(query, given, wanted)
    parts = _parts(query, key, triton.cdiv(n, tiles.rows))
    top = configs.power(wanted.top, 1) if wanted.top else 0
    features = wanted.features
    width = 0 if features is None else features.shape[-1]

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(units, *shape, dtype=torch.float32, device=device)

    sums = Sums(
        zeros(parts, 2, m) if wanted.received else None,
        zeros(n, 2, 8) if wanted.inner or wanted.gap or width else None,
        zeros(n, top) if top else None,
        zeros(n, top).int() if top else None,
    )
    kernel: Any = statistics
    kernel[(units * parts,)](
        query,
        key,
        lse.float().contiguous(),
        *_shared(query, key, scale, given),
        parts,
        _along(wanted),
        sums,
        RECEIVED=wanted.received,
        INNER=wanted.inner,
        GAP=wanted.gap,
        TOP=top,
        FEATURES=width,
        LINES=8 * min(tiles.warps, tiles.cols // 16),
        **_constants(query, given, tiles),
    )
    shape = (batch, heads, n)
    weight, place = _ranked(sums, shape, wanted.top)
    return Found(
        _received(sums.received, batch, heads),
        _summed(sums.rows, shape, 0) if wanted.inner else None,
        _summed(sums.rows, shape, 4) if wanted.gap else None,
        weight,
        place,
        _summed(sums.rows, shape, list(MEANS[:width])) if width else None,
    )


def _shared(query: Tensor, key: Tensor, scale: float, given: Given) -> tuple[Any, ...]:
    heads, groups = query.shape[1], key.shape[1]
    return (
        steps(query),
        steps(key),
        heads,
        heads // groups,
        query.shape[2],
        key.shape[2],
        scale,
        given.columns,
        given.terms,
        given.places,
    )


def _constants(query: Tensor, given: Given, tiles: configs.Config) -> dict[str, Any]:
    one, more = configs.halves(query.shape[3])
    return {
        "size": query.shape[3],
        "KINDS": given.kinds,
        "RANK": given.rank,
        "BAND": given.band,
        "RANGES": given.ranges,
        # Weights and factors are float32, whatever the queries are.
        "PRECISION": configs.precision(torch.float32),
        "ROWS": tiles.rows,
        "COLS": tiles.cols,
        "CHUNK": tiles.chunk,
        "SIZE": one,
        "SIZE_MORE": more,
        **tiles.options(),
    }


def config(query: Tensor, given: Given, wanted: Wanted | None = None) -> configs.Config:
    """Tiles of `statistics`, or of `normalise` where nothing is wanted."""
    how = configs.precision(query.dtype)
    if kernels.interpreted():
        return configs.Config(32, 32, 4, 1, how)
    wide, full = sum(configs.halves(query.shape[3])), query.dtype == torch.float32
    chunk = 32 if full and wide > 32 else 0
    if wanted is None:
        cols = 32 if full or wide > 128 else 64
        chunk = chunk if wide > 64 else 0
        return configs.Config(32 if full else 64, cols, 4, 1 if chunk else 2, how, chunk)
    # Lines that a thread keeps for every row: sums, and the largest weight with its key.
    kept = wanted.inner + wanted.gap + 2 * (wanted.top > 0)
    kept += 0 if wanted.features is None else wanted.features.shape[-1]
    rows, cols, warps = (32, 128, 8) if kept > 7 else (32, 128, 4) if kept > 2 else (64, 64, 4)
    if given.kinds or given.rank or wide > 128:
        rows, cols, warps = 32, 64, 8
    backend, number = configs.card()
    if backend == "hip":
        rows, cols, warps = 32, 64, 4
    elif full or number >= 100:
        # There a thread has a key and every query of a larger tile, and no part of a row to fold.
        rows, cols, warps = 32, 32, 4
    return configs.Config(rows, cols, warps, 1, how, chunk)


def _parts(query: Tensor, key: Tensor, blocks: int) -> int:
    """How many programs share the queries of one head."""
    units = query.shape[0] * query.shape[1]
    programs = 4  # interpreted, one after the other
    if query.is_cuda:
        programs = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count
    granted = max(LINES, query.nbytes + key.nbytes)
    return max(1, min(programs // units, blocks, granted // (8 * units * key.shape[2])))


def _along(wanted: Wanted) -> Along:
    def lines(given: Tensor | None) -> tuple[Tensor | None, int]:
        if given is None:
            return None, 0
        given = given.float().contiguous()
        return given, 0 if len(given) == 1 else given.stride(0)

    return Along(
        *lines(wanted.query_positions), *lines(wanted.key_positions), *lines(wanted.features)
    )


def _received(lines: Tensor | None, batch: int, heads: int) -> Tensor | None:
    if lines is None:
        return None
    total = lines.sum(1, dtype=torch.float64)  # in a fixed order on every device
    return (total[:, 0] - total[:, 1]).view(batch, heads, -1)


def _summed(rows: Any, shape: tuple[int, int, int], which: int | list[int]) -> Tensor:
    total, rest = rows.view(*shape, 2, 8)[..., which].double().unbind(len(shape))
    return total - rest


def _ranked(
    sums: Sums, shape: tuple[int, int, int], top: int
) -> tuple[Tensor | None, Tensor | None]:
    """Weights and keys, the largest first, of equal ones the first key."""
    if sums.surprise is None:
        return None, None
    surprise, place = sums.surprise, sums.place.long()
    order = place.argsort(dim=-1, stable=True)
    surprise, place = surprise.gather(-1, order), place.gather(-1, order)
    order = surprise.argsort(dim=-1, stable=True)
    surprise, place = surprise.gather(-1, order), place.gather(-1, order)
    surprise, place = (t.view(*shape, -1)[..., :top] for t in (surprise, place))
    return torch.exp(-surprise), place.clamp_min(-1)
