"""One sweep over the map in compiled tiles: all that the statistics of a call need, together.

About half the cost of the forward on a CPU, whatever is asked for, and exact: a tile is the product
of one block of queries with one block of keys, read once and never kept. Where numba is missing,
or on another device or dtype, statistics take their fused calls or PyTorch tiles instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias import native
from attnbias.bias import Bias, KeyBias, Padding, Window
from attnbias.observe.largest import joined, largest

if TYPE_CHECKING:
    from attnbias.observe.scene import Scene

ROWS, COLUMNS = 256, 2048  # of one head: 2 MB of scores, which stay in the caches
FAR = 1 << 30


def fits(scene: Scene) -> bool:
    """Whether the compiled sweep takes this call."""
    return native.fits(scene.query, scene.key)


class Sweep:
    """The sums of one call. Everything is (B, H, N) or (B, H, M), float64.

    Attributes:
        columns: attention received. inner: ``sum p (lse - s)``, the entropy of each row.
        gap: mean distance in positions. peak, place: (B, H, N, top), the largest weights and their
            key slots, largest first.
        features: (B, H, N, F), the sums of ``p_ij f_j`` for `features` (B, M, F).

    What is not wanted is None, but for `columns`.
    """

    def __init__(
        self, scene: Scene, wanted: set[str], features: Tensor | None = None, top: int = 1
    ) -> None:
        self.scene = scene
        self.columns = self._zeros(scene.keys)
        rows = scene.queries
        self.inner = self._zeros(rows) if "inner" in wanted else None
        self.gap = self._zeros(rows) if "gap" in wanted else None
        self._top = top if "peak" in wanted else 0
        shape = (scene.batch, scene.heads, rows)
        one = shape if self._top == 1 else (*shape[:2], 0)  # of these the compiled loop takes care
        self._peak = torch.zeros(one)
        self._place = torch.full(one, -1, dtype=torch.int32)
        several = self._top if self._top > 1 else 0
        self._peaks = torch.zeros(*shape, several)
        self._places = torch.full((*shape, several), -1)
        self._values = features
        self.features: Tensor | None = None
        if features is not None:
            self.features = torch.zeros(*shape, features.shape[-1], dtype=torch.float64)
        lse = scene.lse
        self._lse = torch.where(scene.counted, lse, torch.inf).contiguous()
        self._band, self._per_key, self._rest = _split(scene)
        self._query_positions = scene.query_positions.to(scene.query).contiguous()
        self._key_positions = scene.key_positions.to(scene.query).contiguous()
        self._buffer = torch.empty(0)
        for row in range(scene.batch):
            for heads, part in self._blocks():
                low, high = scene.span(part)
                for start in range(low, high, self._step(part)):
                    self._tile(row, heads, part, slice(start, min(start + self._step(part), high)))

    @property
    def peak(self) -> Tensor | None:
        if self._top == 1:
            return self._peak[..., None]
        return self._peaks if self._top else None

    @property
    def place(self) -> Tensor | None:
        if self._top == 1:
            return self._place.long()[..., None]
        return self._places if self._top else None

    def _zeros(self, length: int) -> Tensor:
        return torch.zeros(self.scene.batch, self.scene.heads, length, dtype=torch.float64)

    def _step(self, part: slice) -> int:
        return int(max(COLUMNS, ROWS * COLUMNS // max(part.stop - part.start, 1)))

    def _blocks(self) -> Iterator[tuple[slice, slice]]:
        """Heads and queries of the tiles: several heads at once where whole maps are small."""
        scene = self.scene
        together = max(1, ROWS * COLUMNS // max(scene.queries * scene.keys, 1))
        step = scene.queries if together > 1 else ROWS
        for head in range(0, scene.heads, together):
            for start in range(0, scene.queries, step):
                rows = slice(start, min(start + step, scene.queries))
                yield slice(head, min(head + together, scene.heads)), rows

    def _tile(self, row: int, heads: slice, part: slice, keys: slice) -> None:
        from attnbias.native.sweep import sweep

        count, rows, width = (
            heads.stop - heads.start,
            part.stop - part.start,
            keys.stop - keys.start,
        )
        tile = self._scores(row, heads, part, keys)
        if self._rest is not None:
            tile += self._block(self._rest, row, heads, part, keys).to(tile)
        parts = count if count > 1 else max(1, min(torch.get_num_threads(), rows))
        columns = torch.zeros(parts, width)
        low, high = self._band
        flat = tile.view(count * rows, width)
        here = (row, heads, part)
        empty = self._peak.new_empty(0, dtype=torch.float64)
        inner, gap = (
            empty if t is None else t[here].flatten().clone() for t in (self.inner, self.gap)
        )
        peak, place = (_rows(t, here) for t in (self._peak, self._place))
        sweep(
            flat,
            self._lse[here].reshape(-1).contiguous(),
            self._key_bias(row, heads, keys, width),
            rows,
            (part.start + low - keys.start, part.start + high - keys.start),
            columns,
            inner,
            gap,
            self._query_positions[row, part],
            self._key_positions[row, keys],
            peak.view(torch.int32),
            place,
            keys.start,
        )
        added = columns if count > 1 else columns.double().sum(0, keepdim=True)
        self.columns[row, heads, keys] += added
        results = (self.inner, self.gap, self._peak, self._place)
        for whole, found in zip(results, (inner, gap, peak, place), strict=True):
            if whole is not None and found.numel():
                whole[here] = found.view(count, rows)
        if self._top > 1:
            self._rank(here, tile, keys.start)
        if self._values is not None and self.features is not None:
            means = tile @ self._values[row, keys]
            self.features[here] += means

    def _rank(self, here: tuple[int, slice, slice], tile: Tensor, start: int) -> None:
        """Take in the largest weights of a tile of weights."""
        weight, place = largest(tile, self._top)
        place = torch.where(place >= 0, place + start, -1)
        pairs = ((self._peaks[here], weight), (self._places[here], place))
        weight, place = (torch.cat(pair, -1) for pair in pairs)
        self._peaks[here], self._places[here] = joined(weight, place, self._top)

    def _scores(self, row: int, heads: slice, part: slice, keys: slice) -> Tensor:
        """(heads, queries, keys): scaled products, in a buffer that is used again."""
        scene = self.scene
        query = scene.query[row, heads, part] * scene.scale
        share = scene.heads // scene.groups
        index = torch.arange(heads.start, heads.stop) // share
        size = len(index) * query.shape[1] * (keys.stop - keys.start)
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size)
        tile = self._buffer[:size].view(len(index), query.shape[1], keys.stop - keys.start)
        if len(index) == 1:
            torch.mm(query[0], scene.key[row, int(index[0]), keys].T, out=tile[0])
        else:
            torch.bmm(query, scene.key[row][index, keys].mT, out=tile)
        return tile

    def _key_bias(self, row: int, heads: slice, keys: slice, width: int) -> Tensor:
        if self._per_key is None:
            return torch.empty(0, width)
        per_key = self._per_key
        chosen = per_key[
            row if len(per_key) > 1 else 0, heads if per_key.shape[1] > 1 else slice(0, 1)
        ]
        return chosen[:, keys].expand(heads.stop - heads.start, -1).contiguous()

    def _block(self, bias: Bias, row: int, heads: slice, part: slice, keys: slice) -> Tensor:
        b = slice(row, row + 1) if bias.batch > 1 else slice(0, 1)
        h = heads if bias.heads > 1 else slice(0, 1)
        return bias[b, h, :, :].block(part, keys)[0]


def _rows(whole: Tensor, here: tuple[int, slice, slice]) -> Tensor:
    """A tile's rows of sums that run on, flat and contiguous; empty where they are not wanted."""
    return whole[here].flatten().clone() if whole.shape[-1] else whole.new_empty(0)


def _split(scene: Scene) -> tuple[tuple[int, int], Tensor | None, Bias | None]:
    """What is added to the scores: a band, something per key (B | 1, H | 1, M), and the rest."""
    low, high = -FAR, FAR
    per_key: Tensor | None = None
    rest: Bias | None = None
    for term in [] if scene.bias is None else scene.bias.terms():
        if isinstance(term, Window):
            before, after = term.band()
            low = low if before is None else max(low, before)
            high = high if after is None else min(high, after)
        elif isinstance(term, (Padding, KeyBias)):
            added = term.dense()[:, :, 0].to(scene.query)
            per_key = added if per_key is None else per_key + added
        else:
            rest = term if rest is None else rest + term
    return (low, high), per_key, rest
