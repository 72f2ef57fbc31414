"""Tiles: small pieces of the map, built one after the other, for what has no fused form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.errors import AttnbiasError
from attnbias.observe.scene import HIDDEN, Scene, one

ROWS = 256
ENTRIES = 1 << 19  # scores in one tile at most, beyond 256 queries of one head


@dataclass(frozen=True)
class Tile:
    """A rectangle of the attention map of some rows of the batch and some heads.

    Attributes:
        scene: the call that it belongs to (site, positions, spans, all queries and keys).
        batch, heads, rows, cols: the slices of the map (key and query slots) that the tile covers.
        scores: (b, h, r, c) float32, scaled and with everything that is added to them.
        probabilities: (b, h, r, c) float32, ``exp(scores - lse)`` with the final log-sum-exp of the
            row; rows of queries that are padding, or see nothing, are zero.
        lse: (b, h, r). query_positions: (b, r); key_positions: (b, c), -1 for padding.
    """

    scene: Scene
    batch: slice
    heads: slice
    rows: slice
    cols: slice
    scores: Tensor
    probabilities: Tensor
    lse: Tensor
    query_positions: Tensor
    key_positions: Tensor

    @property
    def visible(self) -> Tensor:
        """(b, h | 1, r, c) bool: the model's own masks let a real query see the key."""
        shape = (self.scores.shape[0], 1, *self.scores.shape[2:])
        real = (self.query_positions >= 0)[:, None, :, None].expand(shape)
        if self.scene.own is None:
            return real
        block = _block(self.scene.own, self.batch, self.heads, self.rows, self.cols)
        return real & (block > HIDDEN)


def tiles(
    scene: Scene,
    *,
    rows: int = ROWS,
    cols: int | None = None,
    wanted: Tensor | None = None,
) -> Iterator[Tile]:
    """Every tile of a call once; keys outside of what the rows can see are left out.

    Where the log-sum-exp is not known yet, it is read off the tiles, which then hold whole rows,
    and is kept for the scene. With `cols` the rows are cut too, and the log-sum-exp is computed
    before. With `wanted` (B, H, N) bool, only tiles that hold one of these rows come, and each
    takes the log-sum-exp from its own scores.
    """
    if cols is not None and wanted is not None:
        raise AttnbiasError("tiles(cols) cuts rows, and tiles(wanted) needs them whole; give one.")
    fresh = wanted is not None or not (scene.lse_known or cols is not None)
    found = torch.full_like(scene.query[..., 0], -torch.inf) if fresh else None
    share = scene.heads // scene.groups
    for start in range(0, scene.queries, rows):
        part = slice(start, min(start + rows, scene.queries))
        low, high = scene.span(part)
        step = max(high - low, 1) if cols is None else cols
        for first in range(low, max(high, low + 1), step):
            keys = slice(first, min(first + step, high))
            for batch, heads in _pieces(
                scene, (part.stop - part.start) * max(keys.stop - first, 1)
            ):
                if wanted is not None and not bool(wanted[batch, heads, part].any()):
                    continue
                query = scene.query[batch, heads, part]
                index = torch.arange(heads.start, heads.stop, device=scene.device) // share
                key = scene.key[batch][:, index, keys]
                scores = scene.scale * (query @ key.mT)
                if scene.bias is not None:
                    scores = scores + _block(scene.bias, batch, heads, part, keys)
                lse = (
                    _row_lse(scene, scores, heads)
                    if found is not None
                    else (scene.lse[batch, heads, part])
                )
                if found is not None:
                    found[batch, heads, part] = lse
                yield _tile(scene, batch, heads, part, keys, scores, lse)
    if found is not None and wanted is None:
        scene.set_lse(found)


def _tile(
    scene: Scene, batch: slice, heads: slice, rows: slice, cols: slice, scores: Tensor, lse: Tensor
) -> Tile:
    positions = scene.query_positions[batch, rows]
    counted = (positions >= 0)[:, None] & (lse > -torch.inf)
    # A blind row has lse -inf: any finite number in its place, then zero.
    normaliser = torch.where(counted, lse, torch.inf)
    return Tile(
        scene=scene,
        batch=batch,
        heads=heads,
        rows=rows,
        cols=cols,
        scores=scores,
        probabilities=torch.exp(scores - normaliser[..., None]),
        lse=lse,
        query_positions=positions,
        key_positions=scene.key_positions[batch, cols],
    )


def _row_lse(scene: Scene, scores: Tensor, heads: slice) -> Tensor:
    if scores.shape[-1] == 0:
        return scores.new_full(scores.shape[:-1], -torch.inf)
    lse = scores.logsumexp(-1)
    if scene.sink is None:
        return lse
    blind = lse == -torch.inf
    with_sink = torch.logaddexp(lse, scene.sink[None, heads, None])
    return with_sink.masked_fill(blind, -torch.inf)


def _pieces(scene: Scene, entries: int) -> Iterator[tuple[slice, slice]]:
    """Slices of batch and heads: everything at once where it is small, one head where it is not."""
    if entries * scene.batch * scene.heads <= ENTRIES:
        yield slice(0, scene.batch), slice(0, scene.heads)
        return
    step = max(1, min(scene.heads, ENTRIES // max(entries, 1)))
    for row in range(scene.batch):
        for head in range(0, scene.heads, step):
            yield slice(row, row + 1), slice(head, min(head + step, scene.heads))


def _block(bias: Bias, batch: slice, heads: slice, rows: slice, cols: slice) -> Tensor:
    """The entries of a bias for a tile; a dimension of size one is broadcast and stays one."""
    b = one(bias.batch, 0) if bias.batch == 1 else batch
    h = one(bias.heads, 0) if bias.heads == 1 else heads
    return bias[b, h, :, :].block(rows, cols)
