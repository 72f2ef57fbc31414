"""What of a bias FlexAttention reads: tensors, and the formula of one entry from them.

A `Part` is a kind with what is constant of it (which dimensions broadcast, how many terms a sum
has) and the tensors that it reads. The constants of all parts make one function; the tensors are
its arguments, so that new values, and new lengths, need no new function. FlexAttention adds up the
gradient of a tensor at one place of a function alone: no tensor here is read at two, columns and
bases are tensors of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnbias.bias import (
    Bias,
    Bucketed,
    Dense,
    Distance,
    GridRelative,
    KeyBias,
    LowRank,
    MaskFunction,
    Neighborhood,
    Padding,
    Relative,
    Segments,
    Window,
)
from attnbias.bias.query_bound import BoundQueryRelative
from attnbias.bias.radial import Basis
from attnbias.bias.transposed import Transposed
from attnbias.lowering.flex_points import points

RANK = 32  # columns of a factor at most: each is read by an instruction of its own
MASKS = (Window, Padding, Segments, Neighborhood, MaskFunction)


class Part(NamedTuple):
    """One term: `kind` names its formula in `flex_entries`, `tensors` are what it reads.

    function: that of a `MaskFunction`, else None.
    """

    kind: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    function: Callable[..., Any] | None = None


def masks(term: Bias) -> bool:
    """Whether a term only hides keys, by a rule that needs no score."""
    return isinstance(term.inner if isinstance(term, Transposed) else term, MASKS)


def reason(term: Bias, gradient: bool) -> str:
    """Why a term has no such formula, in words; empty where it has one. Looks at kinds alone."""
    if isinstance(term, Transposed):
        return reason(term.inner, gradient)
    if isinstance(term, (Relative, KeyBias, Dense, GridRelative, Bucketed, *MASKS)):
        return ""
    if isinstance(term, LowRank):
        rank = term.u.shape[-1]
        return "" if rank <= RANK else f"a rank of {rank} is too many terms for one score"
    if isinstance(term, BoundQueryRelative):
        few = term.index is not None and term._few() is not None
        return "" if few else "a product with the query inside a score is not to be had"
    if not isinstance(term, Distance):
        return f"there is no formula for one entry of {type(term).__name__}"
    if term.metric.function is not None or not isinstance(term.radial, Basis):
        return "a given function of coordinates or distances may be no formula of one entry"
    if gradient and term.metric.name == "great_circle" and any(term.learned):
        return "gradients to places on a sphere are not to be had"
    return ""


def part(term: Bias, device: torch.device) -> Part:
    """The part of a term for which `reason` is empty, on the device of the query."""
    made = _part(term)
    return made._replace(tensors=tuple(_sent(t, device) for t in made.tensors))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device. One number is written there: to copy it would be to wait."""
    known = tensor.device.type == "cpu" and tensor.numel() == 1 and not tensor.requires_grad
    if known and device.type == "cuda":
        return torch.full(tensor.shape, tensor.item(), dtype=tensor.dtype, device=device)
    return tensor.to(device)


def _part(term: Bias) -> Part:
    if isinstance(term, Transposed):
        inner = _part(term.inner)
        return inner._replace(kind=("turned", inner.kind))
    if isinstance(term, KeyBias):
        weight, outer = squeezed(term.weight)
        return Part(("row", outer), (weight,))
    if isinstance(term, Relative):
        table, outer = squeezed(term.table)
        return Part(("strip", outer), (table, number(term.queries - 1)))
    if isinstance(term, Dense):
        tensor, outer = squeezed(term.tensor, 4)
        return Part(("whole", outer), (tensor,))
    if isinstance(term, LowRank):
        (u, outer_u), (v, outer_v) = squeezed(term.u), squeezed(term.v)
        columns = (*u.unbind(-1), *v.unbind(-1))
        return Part(("product", outer_u, outer_v, u.shape[-1]), columns)
    if isinstance(term, GridRelative):
        return _grid(term)
    if isinstance(term, Bucketed):
        (table, outer), (cols, outer_cols) = squeezed(term.table), squeezed(term.cols)
        if term.rows is None:
            return Part(("buckets", outer, None, outer_cols), (table, cols))
        rows, outer_rows = squeezed(term.rows)
        return Part(("buckets", outer, outer_rows, outer_cols), (table, rows, cols))
    if isinstance(term, BoundQueryRelative):
        return _strips(term)
    if isinstance(term, Distance):
        return Part(*points(term))
    return _mask(term)


def _mask(term: Bias) -> Part:
    if isinstance(term, Window):
        low, high = term.band()
        ends = tuple(number(end) for end in (low, high) if end is not None)
        return Part(("band", low is not None, high is not None), ends)
    if isinstance(term, Padding):
        keep, outer = squeezed(term.keep, 1)
        # As integers: with booleans its kernel keeps its registers in memory.
        return Part(("keep", outer), (keep.int(),))
    if isinstance(term, Segments):
        (one, outer), (two, outer_keys) = squeezed(term.query_ids, 1), squeezed(term.key_ids, 1)
        return Part(("same", outer, outer_keys), (one, two))
    if isinstance(term, Neighborhood):
        sides = zip(*term.windows(), strict=True)
        return Part(("near", term.dilation), tuple(t.int() for dim in sides for t in dim))
    assert isinstance(term, MaskFunction)
    starts = tuple(number(start) for start in term._starts)
    moves = (term.batch > 1, term.heads > 1)
    return Part(("rule", *moves), starts, term.function)


def _grid(term: GridRelative) -> Part:
    """Entry ``table[cols[j] - rows[i]]`` of the flat table; special tokens have their own."""
    table, outer = squeezed(term.table.flatten(2))
    device = table.device
    rows = term.rows.offsets(term.steps, device)
    cols = term.cols.offsets(term.steps, device) + term.start
    over, left = term.rows.specials, term.cols.specials
    if term.specials is not None:
        # Any place will do for a token without one, as long as it is in the table.
        rows = torch.cat([rows[:, :1].expand(-1, over), rows], 1)
        cols = torch.cat([cols[:, :1].expand(-1, left), cols], 1)
    if rows.shape[1] < term.queries or cols.shape[1] < term.keys:  # nothing but specials
        rows = rows.new_zeros(1, term.queries)
        cols = cols.new_zeros(1, term.keys)
    (rows, outer_rows), (cols, outer_cols) = squeezed(rows, 1), squeezed(cols, 1)
    kind = ("grid", outer, outer_rows, outer_cols)
    tensors = (table, rows.int(), cols.int())
    if term.specials is None:
        return Part((*kind, None), tensors)
    specials, outer_specials = squeezed(term.specials)
    return Part((*kind, outer_specials), (*tensors, specials, number(over), number(left)))


def _strips(term: BoundQueryRelative) -> Part:
    """The query's product with each of a few vectors; a distance reads the one of its vector."""
    found = term._few()
    assert found is not None
    index, low, high = found
    query, embedding = term._same_kind()
    strip, outer = squeezed(query @ embedding[..., low:high, :].mT)
    return Part(("strips", outer), (strip, index.int(), number(term.queries - 1)))


def squeezed(tensor: Tensor, dims: int = 2) -> tuple[Tensor, tuple[bool, ...]]:
    """Without those of the first `dims` dimensions that have size one, and which ones are left.

    The result is another tensor object each time: FlexAttention sums gradients by objects.
    """
    left = tuple(n != 1 for n in tensor.shape[:dims])
    drop = [d for d, stays in enumerate(left) if not stays]
    made = tensor.squeeze(drop)
    return (made if made.ndim else made.reshape(1)), left


def number(value: int) -> Tensor:
    """A number as a tensor: it may change without a new function."""
    return torch.full((1,), value, dtype=torch.int32)
