"""Structures as the Triton kernels read them: what each term of a bias becomes.

A table on a grid or by classes, and either with queries and keys exchanged, is one sum of two
numbers: ``data[b, h, rows[b, h, i] + cols[b, h, j]]``.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias, Bucketed, Dense, GridRelative, Neighborhood
from attnbias.bias.query_bound import BoundQueryRelative
from attnbias.bias.tokens import Tokens
from attnbias.bias.transposed import Transposed
from attnbias.errors import AttnbiasError
from attnbias.kernels.ranges import Ranges
from attnbias.kernels.terms import (
    Box,
    Fours,
    Indexed,
    Same,
    Spread,
    Whole,
    shifted,
)

# One term of a kernel: its kind and what it reads.
Term = tuple[object, tuple[Any, ...]]

NOWHERE = -(2**30)  # of a token without a place: any sum with it is negative
LARGEST = 2**29  # entries of a table of one head: sums of two such numbers are 32-bit
INDEXED = (GridRelative, Bucketed)

# A neighborhood on a device: it stores lengths, and is asked for the same windows in every layer.
_windows: Any = weakref.WeakKeyDictionary()


def refusal(term: Bias) -> str:
    """Why no kernel reads this structure, with what to do; empty where one does."""
    inner = term.inner if isinstance(term, Transposed) else term
    if isinstance(inner, INDEXED):
        entries = inner.table.shape[2:].numel()
        if entries >= LARGEST // 4:  # four copies of some
            return f"a table of {entries} entries is too large for 32-bit places"
        return ""
    if isinstance(inner, Neighborhood):
        return ""
    if isinstance(term, Dense):
        return ""
    if isinstance(term, BoundQueryRelative):
        # With an index the same few vectors serve many distances.
        few = term._few()
        if few is not None:
            entries = term.queries * (few[2] - few[1])
            return "" if entries < LARGEST else "too many queries for 32-bit places"
        return (
            "a QueryRelative with a vector for every distance is made by tiles (stream); one with "
            "few vectors and an index has a kernel"
        )
    name = type(term).__name__
    if name == "MaskFunction":
        return (
            "a MaskFunction is a Python function, which no kernel can call: write it as Window, "
            "Segments, Padding, Neighborhood or Dense"
        )
    return f"no kernel makes the entries of {name}"


def made(term: Bias, device: torch.device) -> list[Term]:
    """What the kernels read of a structure that `refusal` lets through."""
    if isinstance(term, Dense):
        return [_dense(term, device)]
    if isinstance(term, BoundQueryRelative):
        return [_spread(term, device)]
    inner, exchanged = (term.inner, True) if isinstance(term, Transposed) else (term, False)
    if isinstance(inner, GridRelative):
        return [_grid(inner, device, exchanged)]
    if isinstance(inner, Bucketed):
        return [_bucketed(inner, device, exchanged)]
    assert isinstance(inner, Neighborhood)
    first, wide, cell = _neighborhood(inner, device)
    edge, cells = first.shape[1], cell.shape[1]
    return [(("box", exchanged, *inner.dilation), Box(first, wide, edge, cell, cells))]


def of_segments(query_ids: Tensor, key_ids: Tensor) -> Term:
    """Ids ``(batch | 1, length)`` in any order, compared entry by entry."""
    rows, cols = (t if t.stride(-1) == 1 else t.contiguous() for t in (query_ids, key_ids))
    return ("same", Same(*(rows, *steps(rows, 1), cols, *steps(cols, 1))))


def of_neighborhood(term: Bias, device: torch.device) -> Ranges | None:
    """The range that holds the keys of each query of a neighborhood; None for anything else."""
    if isinstance(term, Neighborhood) and term.queries and term.keys:
        first, wide, _ = _neighborhood(term, device)
        last = first + wide
        low = high = torch.zeros_like(first[0])
        for dim, size in enumerate(term.grid):
            low, high = low * size + first[dim], high * size + last[dim]
        start = term.part[1].start
        low, high = ((t - start).clamp(0, term.keys)[None] for t in (low, high + 1))
        return Ranges(low.int(), torch.maximum(low, high).int(), False)
    return None


def steps(tensor: Tensor, dims: int) -> Any:
    """Of the first dimensions, 0 where the size is 1."""
    sizes = zip(tensor.shape[:dims], tensor.stride(), strict=False)
    return tuple(0 if n == 1 else s for n, s in sizes)


def lines(tensor: Tensor, device: torch.device, kind: torch.dtype = torch.float32) -> Tensor:
    """On the device, in a format, the last dimension in one piece."""
    found = tensor.detach().to(device, kind)
    return found if found.stride(-1) == 1 or found.shape[-1] == 1 else found.contiguous()


def _dense(term: Dense, device: torch.device) -> Term:
    tensor = term.tensor.detach().to(device)
    return ("whole", Whole(tensor, *steps(tensor, 4)))


def _indexed(
    data: Tensor, rows: Tensor, cols: Tensor, special: tuple[int, int, int] | None = None
) -> Term:
    kind = "indexed" if special is None else "indexed_some"
    each = (data, *steps(data, 2), rows, *steps(rows, 2), cols, *steps(cols, 2))
    return (kind, Indexed(*(*each, *(special or (0, 0, 0)))))


def _grid(term: GridRelative, device: torch.device, exchanged: bool) -> Term:
    if not exchanged and _in_fours(term):
        return _fours(term, device)
    data = lines(term.table.flatten(2), device)
    rows = _places(term.rows, term.steps, term.start, -1, device)
    cols = _places(term.cols, term.steps, 0, 1, device)
    rows, cols = (cols, rows) if exchanged else (rows, cols)
    if term.specials is None:
        return _indexed(data, rows, cols)
    over, left, special = term.rows.specials, term.cols.specials, term.specials
    if exchanged:
        over, left, special = left, over, special.mT
    more = lines(special, device).flatten(2)
    size = [max(pair) for pair in zip(data.shape[:2], more.shape[:2], strict=True)]
    whole = torch.cat([t.expand(*size, -1) for t in (data, more)], -1)
    return _indexed(whole, rows, cols, (over, left, data.shape[-1]))


def _in_fours(term: GridRelative) -> bool:
    """Whether keys from a multiple of four on are four neighbours in the last dimension."""
    cols = term.cols
    whole = cols.given is None and cols.specials == 0 and term.specials is None
    return whole and cols.regular and cols.size[-1] % 4 == 0 and cols.stride[-1] == 1


def _fours(term: GridRelative, device: torch.device) -> Term:
    """The last dimension is padded to a multiple of four; the first key is place 0."""
    table = lines(term.table, device)
    table = torch.nn.functional.pad(table, (0, -table.shape[-1] % 4))
    made = [1]
    for size in reversed(table.shape[3:]):
        made.append(made[-1] * size)
    jumps = tuple(reversed(made))
    start = sum(c * s for c, s in zip(term.center, jumps, strict=True))
    first = sum(o * s for o, s in zip(term.cols.origin, jumps, strict=True))
    rows = (start + first - term.rows.offsets(jumps, device)).int()
    cols = (term.cols.offsets(jumps, device)[0] - first).int()
    each = (*shifted(table.flatten(2)), rows, *steps(rows, 1), cols)
    return ("fours", Fours(*each))


def _places(
    tokens: Tokens, steps_: tuple[int, ...], start: int, sign: int, device: torch.device
) -> Tensor:
    """``(batch | 1, 1, length)`` 32-bit: the share of each token in the place of an entry."""
    offsets = (tokens.offsets(steps_, device) * sign + start).int()
    if tokens.specials:
        offsets = torch.nn.functional.pad(offsets, (tokens.specials, 0), value=NOWHERE)
    return offsets[:, None]


def _bucketed(term: Bucketed, device: torch.device, exchanged: bool) -> Term:
    classes, width = term.table.shape[2:]
    if term.rows is None:
        rows = torch.arange(0, classes * width, width, dtype=torch.int32, device=device)[None, None]
    else:
        rows = _classes(term.rows, classes, "rows", device) * width
    cols = _classes(term.cols, width, "cols", device)
    data = lines(term.table.flatten(2), device)
    return _indexed(data, *((cols, rows) if exchanged else (rows, cols)))


def _classes(index: Tensor, classes: int, name: str, device: torch.device) -> Tensor:
    """Classes as 32-bit numbers; what is no class would be read outside of the table."""
    index = lines(index, device, torch.int32)
    inside = ((index >= 0) & (index < classes)).all()
    if device.type == "cuda":
        torch._assert_async(inside)  # waits for nothing
    elif device.type == "cpu" and not bool(inside):
        raise AttnbiasError(
            f"Bucketed {name} names classes 0 to {classes - 1} of the table, got values from "
            f"{int(index.min())} to {int(index.max())}."
        )
    return index


def _spread(term: BoundQueryRelative, device: torch.device) -> Term:
    few = term._few()
    assert few is not None
    index, low, high = few
    query, embedding = (t.detach().to(device, torch.float32) for t in (term.query, term.embedding))
    data = query @ embedding[..., low:high, :].mT
    index = index.to(device, torch.int32).contiguous()
    return ("spread", Spread(*(data, *steps(data, 3), index)))


def _neighborhood(term: Neighborhood, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    kept = _windows.setdefault(term, {})
    if device not in kept:
        first, last, cell = term.windows()
        made = (first, last - first, cell)
        kept[device] = tuple(t.to(device, torch.int32).contiguous() for t in made)
    found: tuple[Tensor, Tensor, Tensor] = kept[device]
    return found


__all__ = ["Term", "lines", "made", "of_neighborhood", "of_segments", "refusal", "steps"]
