"""Gradients of parameters through those of entries: strips of bounded memory, pulled back by the
structure itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from attnbias import kernels
from attnbias.bias import Bias, Dense, GridRelative, Sum
from attnbias.bias.transposed import Transposed
from attnbias.kernels import entries
from attnbias.kernels.backward_launch import Work
from attnbias.kernels.indexed import table_sums
from attnbias.kernels.launch import device_of
from attnbias.lowering.total import Total

ENTRIES = 2**26  # of a strip, about: 256 MB

Strip = tuple[slice, slice, slice]


def pull(work: Work, places: Sequence[int], total: Total) -> None:
    """Add the gradients of the terms at `places` of ``total.bias.terms()`` to `total`.

    Terms with the same broadcast dimensions share their strips.
    """
    if total.bias is None:
        return
    with device_of(work.query):
        _pull(work, places, total, total.bias.terms())


def _pull(work: Work, places: Sequence[int], total: Total, terms: list[Bias]) -> None:
    groups: dict[tuple[int, ...], list[int]] = {}
    for at in places:
        term = terms[at]
        if not term.requires_grad or direct(work, at, total):
            continue
        down = int(isinstance(term, Dense) and term.tensor.shape[2] == 1)
        groups.setdefault((term.batch, term.heads, down), []).append(at)
    for (batch, heads, down), some in groups.items():
        with torch.enable_grad():
            parts = [terms[at] for at in some]
            whole = parts[0] if len(parts) == 1 else Sum(parts)
        for own_b, own_h, rows in strips(work, batch, heads, bool(down)):
            cols = columns(work, rows)
            if cols.stop <= cols.start:
                continue
            step = entries.strip(
                work, (own_b, own_h), (batch == 1, heads == 1, bool(down)), rows, cols
            )
            with torch.enable_grad():
                piece = whole[own_b, own_h, slice(0, 1) if down else rows, cols]
            for at, part in zip(some, piece.terms(), strict=True):
                before = sum(len(t.parameters()) for t in terms[:at])
                give(total, before, part, step if len(some) == 1 else step.clone())


def direct(work: Work, at: int, total: Total) -> bool:
    """A stored matrix is where its gradient is written; False where it is no such matrix."""
    assert total.bias is not None
    terms = total.bias.terms()
    term = terms[at]
    place = sum(len(t.parameters()) for t in terms[:at])
    sums = total.sums[place] if place < len(total.sums) else None
    n, m = work.query.shape[2], work.key.shape[2]
    if not isinstance(term, Dense) or sums is None or term.tensor is not total.leaves[place]:
        return False
    batch, heads = term.batch, term.heads
    whole = sums.dtype == torch.float32 and sums.is_contiguous()
    if not whole or sums.shape[2:] != (n, m) or n == 1:
        return False
    for own_b, own_h, rows in strips(work, batch, heads, False, keys=1):
        into = sums[own_b if batch > 1 else slice(None), own_h if heads > 1 else slice(None), rows]
        entries.strip(
            work, (own_b, own_h), (batch == 1, heads == 1, False), rows, slice(0, m), into
        )
    return True


def give(total: Total, before: int, part: Bias, step: Tensor) -> None:
    """Pull a strip back and add it to the parameters from number `before` on."""
    stored = part.parameters()
    inner = part.inner if isinstance(part, Transposed) else part
    if isinstance(inner, GridRelative) and not kernels.interpreted():
        grads = pull_grid(inner, step if inner is part else step.mT)
    else:
        grads = part.pull(step)
    skipped: list[Tensor | None] = [None] * before
    total.take([*stored[:1] * before, *stored], [*skipped, *grads])


def pull_grid(bias: GridRelative, step: Tensor) -> tuple[Tensor | None, ...]:
    """`GridRelative.pull` without atomics on a GPU."""
    over, left = bias.rows.specials, bias.cols.specials
    device, table = step.device, bias.table
    inner = step[:, :, over:, left:]
    rows = bias.start - bias.rows.offsets(bias.steps, device)
    cols = bias.cols.offsets(bias.steps, device)
    found = table_sums(inner.float(), rows, cols, table.shape[2:].numel())
    found = found.reshape(*found.shape[:2], *table.shape[2:]).sum_to_size(table.shape)
    grads: list[Tensor | None] = [found.to(table.dtype)]
    if bias.specials is not None:
        whole = step.new_zeros(*step.shape[:2], over + 1, left + 1)
        whole[:, :, :over, :left] = step[:, :, :over, :left]
        whole[:, :, :over, left] = step[:, :, :over, left:].sum(3)
        whole[:, :, over, :left] = step[:, :, over:, :left].sum(2)
        grads.append(whole.sum_to_size(bias.specials.shape).to(bias.specials.dtype))
    return tuple(grads)


def strips(
    work: Work, batch: int, heads: int, down: bool, keys: int | None = None
) -> Iterator[Strip]:
    """Batch elements, heads and queries of each strip; what the bias broadcasts is whole."""
    all_batch, all_heads, n = work.query.shape[:3]
    m = work.key.shape[2] if keys is None else keys
    block = entries.block_rows(work)
    least = (1 if down else min(n, block)) * m
    few_heads = 1 if heads == 1 else max(1, min(all_heads, ENTRIES // least))
    few_batch = 1
    if batch > 1 and few_heads == all_heads:
        few_batch = max(1, min(all_batch, ENTRIES // (least * few_heads)))
    rows = n
    if not down:
        rows = max(1, ENTRIES // (m * few_heads * few_batch) // block) * block
    for b in range(0, all_batch, all_batch if batch == 1 else few_batch):
        own_b = slice(0, all_batch) if batch == 1 else slice(b, min(b + few_batch, all_batch))
        for h in range(0, all_heads, all_heads if heads == 1 else few_heads):
            own_h = slice(0, all_heads) if heads == 1 else slice(h, min(h + few_heads, all_heads))
            for i in range(0, n, rows):
                yield own_b, own_h, slice(i, min(i + rows, n))


def columns(work: Work, rows: slice) -> slice:
    """The keys that a band leaves to some queries."""
    first, last = 0, work.key.shape[2]
    if work.given.band % 2 == 1:
        first = max(first, rows.start + work.given.places.low)
    if work.given.band >= 2:
        last = min(last, rows.stop + work.given.places.high)
    return slice(first, max(first, last))


__all__ = ["give", "pull", "pull_grid", "strips"]
