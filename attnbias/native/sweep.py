"""One pass over a tile of scores for everything that statistics ask of an attention map.

A tile has one row per (head, query), `rows` queries in a row of heads; of row ``r``, query
``i = r % rows``, the keys ``i + low <= j <= i + high`` are seen. Scores become weights in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnbias.native.jit import exp32, kernel, prange


@kernel
def sweep(
    tile: Any,
    lse: Any,
    key_bias: Any,
    rows: int,
    band: Any,
    columns: Any,
    surprise: Any,
    gap: Any,
    query_positions: Any,
    key_positions: Any,
    peak: Any,
    place: Any,
    start: int,
) -> None:
    """Scores to ``p = e^(s - lse)``; what each row and column of them adds up to.

    `columns` (parts, keys): the rows are cut into parts of equal size, each with sums of its own,
    so that threads do not meet. `surprise` (rows) takes ``sum p (lse - s)``; `gap` takes ``sum p
    |position of query - position of key|``; `peak` and `place` keep the largest weight, as the bits
    of a float32 (which order as integers do where no number is negative), and its key, counted from
    `start`. Each of `surprise`, `gap`, `peak` is left out where it has no entry. A row with `lse`
    plus infinity is no query: all its weights are zero. `key_bias` (heads, keys) has one row for
    each head of the tile, or none.
    """
    height, width = tile.shape
    parts = columns.shape[0]
    step = (height + parts - 1) // parts
    for part in prange(parts):
        mine = columns[part]
        for r in range(part * step, min((part + 1) * step, height)):
            i = r % rows
            first = min(max(i + band[0], 0), width)
            last = max(min(i + band[1] + 1, width), first)
            top = lse[r]
            if top == np.inf:
                tile[r, :] = np.float32(0)
                continue
            tile[r, :first] = np.float32(0)
            tile[r, last:] = np.float32(0)
            line = tile[r, first:last]
            if key_bias.shape[0]:
                more = key_bias[r // rows, first:last]
                for j in range(line.shape[0]):
                    line[j] += more[j]
            if surprise.shape[0]:
                total = np.float32(0)
                for j in range(line.shape[0]):
                    x = line[j] - top
                    x = x if x > np.float32(-100.0) else np.float32(-100.0)  # 0 times infinity
                    weight = exp32(x)
                    line[j] = weight
                    total -= weight * x
                surprise[r] += total
            else:
                for j in range(line.shape[0]):
                    line[j] = exp32(line[j] - top)
            own = mine[first:last]
            for j in range(line.shape[0]):
                own[j] += line[j]
            if gap.shape[0]:
                here, there = query_positions[i], key_positions[first:last]
                far = np.float32(0)
                for j in range(line.shape[0]):
                    far += line[j] * abs(here - there[j])
                gap[r] += far
            if peak.shape[0]:
                bits = line.view(np.int32)
                best = np.int32(0)
                for j in range(line.shape[0]):
                    best = max(best, bits[j])
                if best > peak[r]:
                    peak[r] = best
                    for j in range(line.shape[0]):
                        if bits[j] == best:
                            place[r] = start + first + j
                            break
