"""Few queries: the keys are split over programs, each makes its part, and a second kernel joins the
parts exactly, always in the same order.

Heads that share keys are rows of one tile (one query of eight heads that read the same keys is a
tile of eight rows), so that keys and values are read once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnbias import kernels
from attnbias.kernels import configs
from attnbias.kernels.forward import part, store, sweep
from attnbias.kernels.places import span, whole_span

MOST = 64  # rows of a tile
FEW = 16  # queries: up to here always
SHORTEST = 256  # keys of a part, about
PARTS = 64
# Terms whose entries can be read for rows of several heads: see `terms.add_terms`.
BY_COLUMN = frozenset(
    {"row", "strip", "whole", "indexed", "indexed_some", "fours", "spread", "same", "box"}
)


@triton.jit
def decode(
    query, key, value, out, lse,
    query_steps, key_steps, value_steps,
    out_part, out_batch, out_head, out_row, lse_part,
    heads, share, together, n, m, parts, scale, unit,
    columns, terms, places, drop,
    size: tl.constexpr, width: tl.constexpr, KINDS: tl.constexpr, RANK: tl.constexpr,
    BAND: tl.constexpr, RANGES: tl.constexpr, DROPS: tl.constexpr, PRECISION: tl.constexpr,
    FOLDS: tl.constexpr, CHAINS: tl.constexpr, GROUPED: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
    SIZE: tl.constexpr, SIZE_MORE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_MORE: tl.constexpr,
):  # fmt: skip
    """One program: all n queries of `together` heads that share their keys, and one of `parts`
    equal runs of the tiles that they see. Row r is query ``r % n`` of head ``r // n``.

    out ``(parts, b, h, n, width)``, lse ``(parts, b, h, n)``: those of a part alone. The rest as in
    `forward.forward`; GROUPED: whether together is more than 1.
    """
    own = tl.program_id(0) % parts
    unit_of = tl.program_id(0) // parts
    lots = heads // together
    b = (unit_of // lots).to(tl.int64)
    low = (unit_of % lots * together).to(tl.int64)
    r = tl.arange(0, ROWS)
    im = r < together * n
    i = r
    h = low
    ahead = low + r * 0
    if GROUPED:
        # Rows that are not there read the last head.
        ahead = low + tl.minimum(r // n, together - 1)
        i = r % n
        h = ahead[:, None]
    group = low // share
    # Every row has a start of its own: the pointers of the tile begin there.
    queries = query + b * query_steps[0] + ahead[:, None] * query_steps[1]
    q = queries + i[:, None] * query_steps[2]
    if CHUNK == 0:
        q = part(queries, query_steps[2], i, im, size, 0, SIZE, True)
    q_more = q
    if SIZE_MORE > 0 and CHUNK == 0:
        q_more = part(queries, query_steps[2], i, im, size, SIZE, SIZE_MORE, True)
    keys = key + b * key_steps[0] + group * key_steps[1]
    values = value + b * value_steps[0] + group * value_steps[1]
    left = q
    rights = keys
    right_step = 0
    if RANK > 0:
        lefts = columns.left + b * columns.left_batch + ahead[:, None] * columns.left_head
        left = part(lefts, columns.left_row, i, im, RANK, 0, RANK, True)
        if CHAINS:
            left = (left.to(tl.float32) / scale).to(left.dtype)
        rights = columns.right + b * columns.right_batch + low * columns.right_head
        right_step = columns.right_row
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    sums_more = total
    if WIDTH_MORE > 0:
        sums_more = tl.zeros((ROWS, WIDTH_MORE), tl.float32)
    first, last = span(places, b, 0, i, im, n, m, BAND, RANGES, ROWS)
    inner, ended = whole_span(places, b, 0, i, im, n, m, BAND, RANGES, ROWS)
    first = first // COLS * COLS
    tiles = tl.maximum(last - first + COLS - 1, 0) // COLS
    each = (tiles + parts - 1) // parts
    start = first + own * each * COLS
    count = tl.maximum(tl.minimum(tiles - own * each, each), 0)
    one = tl.minimum(tl.maximum((inner - start + COLS - 1) // COLS, 0), count)
    two = tl.minimum(tl.maximum(ended // COLS - start // COLS, one), count)
    top, total, sums, sums_more = sweep(
        q, q_more, left, top, total, sums, sums_more,
        keys, values, rights, key_steps[2], value_steps[2], right_step,
        start + one * COLS, two - one, 0, two - one, b, h, i, im, n, m, scale, unit,
        terms, places, drop,
        size, width, KINDS, RANK, BAND, RANGES, DROPS, PRECISION, FOLDS, CHAINS, False, CHUNK,
        ROWS, COLS, SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
    )  # fmt: skip
    top, total, sums, sums_more = sweep(
        q, q_more, left, top, total, sums, sums_more,
        keys, values, rights, key_steps[2], value_steps[2], right_step,
        start, one, (two - one) * COLS, count - two + one, b, h, i, im, n, m, scale, unit,
        terms, places, drop,
        size, width, KINDS, RANK, BAND, RANGES, DROPS, PRECISION, FOLDS, CHAINS, True, CHUNK,
        ROWS, COLS, SIZE, SIZE_MORE, WIDTH, WIDTH_MORE,
    )  # fmt: skip
    safe = tl.where(total == 0.0, 1.0, total)
    outs = out + own * out_part + b * out_batch + ahead[:, None] * out_head
    store(outs, out_row, i, im, sums / safe[:, None], width, 0, WIDTH)
    if WIDTH_MORE > 0:
        store(outs, out_row, i, im, sums_more / safe[:, None], width, WIDTH, WIDTH_MORE)
    if FOLDS:
        top *= scale
    logs = tl.where(total == 0.0, float("-inf"), top + tl.log(safe))
    tl.store(lse + own * lse_part + (b * heads + ahead) * n + i, logs, mask=im)


@triton.jit
def join(
    outs, lses, out, lse, parts, rows, width,
    PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One row of the output from its parts: ``outs (parts, rows, width)``, ``lses (parts, rows)``;
    one program makes WIDTH features of it.
    """
    pieces = tl.cdiv(width, WIDTH)
    row = (tl.program_id(0) // pieces).to(tl.int64)
    f = tl.program_id(0) % pieces * WIDTH + tl.arange(0, WIDTH)
    p = tl.arange(0, PARTS)
    logs = tl.load(lses + p.to(tl.int64) * rows + row, mask=p < parts, other=float("-inf"))
    top = tl.max(logs, 0)
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(logs - safe)
    total = tl.sum(weights, 0)
    whole = tl.where(total == 0.0, 1.0, total)
    made = tl.load(
        outs + (p.to(tl.int64)[:, None] * rows + row) * width + f[None, :],
        mask=(p < parts)[:, None] & (f < width)[None, :], other=0.0,
    )  # fmt: skip
    summed = tl.sum(made * (weights / whole)[:, None], 0)
    tl.store(out + row * width + f, summed.to(out.dtype.element_ty), mask=f < width)
    tl.store(lse + row, tl.where(total == 0.0, float("-inf"), safe + tl.log(whole)))


@dataclass(frozen=True)
class Split:
    """together: heads of a program; rows: of a tile; parts: of the keys."""

    together: int
    rows: int
    parts: int


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a card; interpreted, as many as make tests split."""
    if device.type != "cuda":
        return 16
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def few(query: Tensor, key: Tensor, given: Any) -> Split | None:
    """How to compute few queries, or None where there are enough for `forward.forward`."""
    batch, heads, n = query.shape[:3]
    groups, m = key.shape[1:3]
    share = heads // groups
    if n > MOST:
        return None
    kinds = {kind if isinstance(kind, str) else kind[0] for kind in given.kinds}
    own = given.rank > 0 and given.columns.right_head != 0  # the heads' own columns of keys
    together = share if share * n <= MOST and kinds <= BY_COLUMN and not own else 1
    units = batch * (heads // together)
    room = 2 * processors(query.device)
    if n > FEW and 2 * units > room:
        return None
    shortest = 64 if kernels.interpreted() else SHORTEST
    parts = max(1, min(PARTS, room // units, -(-m // shortest)))
    return Split(together, configs.power(together * n), parts)


def decode_pass(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    steps: tuple[Any, Any, Any],
    scale: float,
    given: Any,
    split: Split,
    constants: dict[str, Any],
) -> None:
    """Fills `out` and `lse`, contiguous. steps: of query, key and value; constants: those of the
    launch (`launch.constants`).
    """
    batch, heads, n, size = query.shape
    groups, m, width = value.shape[1:]
    parts, rows = split.parts, batch * heads * n
    config = configs.choose("decode", query.dtype, size, width, given.rank)
    made, logs = out, lse
    if parts > 1:
        made = torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)
        logs = torch.empty(parts, *lse.shape, dtype=torch.float32, device=out.device)
    kernel: Any = decode
    kernel[(parts * batch * heads // split.together,)](
        query,
        key,
        value,
        made,
        logs,
        *steps,
        rows * width,
        heads * n * width,
        n * width,
        width,
        rows,
        heads,
        heads // groups,
        split.together,
        n,
        m,
        parts,
        scale,
        columns=given.columns,
        terms=given.terms,
        places=given.places,
        drop=given.drop,
        **constants,
        PRECISION=config.precision,
        GROUPED=split.together > 1,
        ROWS=split.rows,
        COLS=config.cols,
        CHUNK=config.chunk,
        **config.options(),
    )
    if parts > 1:
        features = min(64, configs.power(width))
        joined: Any = join
        joined[(rows * -(-width // features),)](
            made, logs, out, lse, parts, rows, width, PARTS=configs.power(parts, 2), WIDTH=features
        )
