"""The engine of `steer`: one attention call, edited by every rule in force, exactly.

Order: the biases of all rules of all nested contexts are summed; then the reallocations in the
order given (an outer context first), each seeing the shares after the one before.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.shifted import shifted
from attnbias.steer import extra
from attnbias.steer.edit import EVERY, Active, Edit, Edited, Memory
from attnbias.steer.groups import Groups
from attnbias.steer.lines import few
from attnbias.steer.placing import numbers, reach
from attnbias.steer.reallocating import reallocate
from attnbias.steer.shift import shift

if TYPE_CHECKING:
    from attnbias.hub import Call

_SKIP = True


@contextmanager
def never_skip() -> Iterator[None]:
    """For tests: rows that nothing changes are computed by the edited path too."""
    global _SKIP
    _SKIP = False
    try:
        yield
    finally:
        _SKIP = True


def edited(call: Call, active: Sequence[Active]) -> Edited:
    """What becomes of one call under the rules.

    Rows that no rule changes (heads, batch rows, query rows that see no chosen key, padding) are
    the plain output, bit for bit; where no row is changed the output is None.
    """
    alike = _alike(call, active)
    again = None if alike is None else _again(call, alike)
    if again is not None:
        return again
    edit = Edit(call)
    for item in active:
        if item.uses("vectors"):
            extra.apply(edit, item)
    for item in active:
        if item.uses("bias"):
            _bias(edit, item)
    moves = [item for item in active if item.uses("reallocate")]
    short = shift(edit) if _SKIP and not moves else None
    if short is not None:
        some, output, every = short
        if alike is not None and call.shared is not None:
            call.shared[alike] = (edit.biases, every) if some else None
    else:
        some, output = _long(edit, active, moves)
    for item in active:
        if item.uses("outputs"):
            output = _outputs(edit, item, output)
    if output is not None and call.training and call.dropout > 0:
        raise Refused(
            f"{call.site} trains with attention dropout {call.dropout:g}, which an edited call "
            "cannot apply: set the dropout to 0 in the model's config, or write model.eval()."
        )
    for item in active:
        if item.uses("look"):
            found = item.rule.look(item.site(edit))
            item.effects.add("idle" if found is None else "changed")
            if found is not None:
                item.memory.looked[call.site] = found
    watched = any(one.role == "see" for one in call.session.participants)
    return Edited(output, edit.total if some and watched else None, *edit.seen())


def _alike(call: Call, active: Sequence[Active]) -> Hashable | None:
    """What names the biases of a decoded token where they are the same in every layer."""
    if call.query.shape[2] > 1 or not _SKIP or call.shared is None:
        return None
    if not all(item.rule.layers_alike and not item.looks_only for item in active):
        return None
    if any(one.role == "see" for one in call.session.participants):
        return None
    rules = tuple((id(item.memory), item.heads) for item in active)
    return ("alike", call.site.tower, call.site.kind, call.query.shape, call.key.shape, rules)


def _again(call: Call, alike: Hashable) -> Edited | None:
    """What became of the same token in a layer before, on this layer's vectors."""
    if call.shared is None or alike not in call.shared:
        return None
    kept = call.shared[alike]
    if kept is None:
        return Edited(None, None, call)
    bias, every = kept
    output = shifted(call, bias.weight, every=every)
    return None if output is None else Edited(output, None, call)


def _bias(edit: Edit, item: Active) -> None:
    bias = item.rule.bias(item.site(edit))
    if bias is None:
        item.effects.add("idle")
        return
    _check_bias(bias, item, edit)
    edit.add(bias, item.heads)
    if "changed" not in item.effects:
        parts = bias.parameters()
        some = not parts or any(bool((part != 0).any()) for part in parts)
        item.effects.add("changed" if some else "missed")


def _long(
    edit: Edit, active: Sequence[Active], moves: Sequence[Active]
) -> tuple[bool, Tensor | None]:
    """Whether a row is changed, and the output; rows are told apart one by one."""
    call = edit.call
    if edit.biases is not None:
        reached = reach(edit.biases, call.bias, edit.shape)
        edit.touched = edit.touched | reached.to(edit.touched.device)
    for item in moves:
        reallocate(edit, item)
    if not _SKIP:
        for item in active:
            edit.mark(torch.ones_like(edit.touched[:, :1]), item.heads)
    if call.padded:
        edit.touched = edit.touched & (call.query_positions >= 0)[:, None, :]
    if few(edit) and bool(edit.touched.all()):
        return True, edit.attend(range(edit.shape[1])).transpose(1, 2).contiguous()
    some = bool(edit.touched.any())
    return some, _output(edit) if some else None


def _output(edit: Edit) -> Tensor:
    call, touched = edit.call, edit.touched
    heads = touched.any(2).any(0).nonzero()[:, 0].tolist()
    if edit.apart is not None and set(heads) <= set(edit.apart[0].heads):
        groups, shares = edit.apart
        if groups.plain is not None and _SKIP:
            out = groups.plain.clone()
            groups.write(out, shares)
            return out
        if not bool(touched[:, :, : groups.first].any()):
            return _written(edit, groups, shares)
    if bool(touched.all()):
        return edit.attend(heads).transpose(1, 2).contiguous()
    rows = _rows(touched)
    out = edit.attend(heads, rows=rows).transpose(1, 2)
    return _joined(call.plain_where(~touched), out, touched, heads, rows)


def _written(edit: Edit, groups: Groups, shares: Tensor) -> Tensor:
    """Groups that were computed apart, and the plain output where nothing is changed."""
    first, touched = groups.first, edit.touched
    later = touched[:, :, first:]
    if bool(later.all()):
        out = edit.call.plain_where(~touched, fresh=True)
        groups.write(out, shares)
        return out
    batch, heads, queries, _ = edit.query.shape
    out = edit.query.new_empty(batch, queries, heads, edit.value.shape[-1])
    groups.write(out, shares)
    rows, every = slice(first, queries), list(groups.heads)
    some = out[:, rows] if len(every) == heads else out[:, rows, every]
    return _joined(edit.call.plain_where(~touched), some, touched, every, rows)


def _joined(
    plain: Tensor, out: Tensor, touched: Tensor, heads: Sequence[int], rows: slice
) -> Tensor:
    """The plain output with some rows of some heads in it where they are touched."""
    index = numbers(tuple(heads), plain.device)
    chosen = touched[:, :, rows].index_select(1, index).transpose(1, 2)[..., None]
    some = plain[:, rows]
    kept = torch.where(chosen, out.to(plain.dtype), some.index_select(2, index))
    some = some.index_copy(2, index, kept)
    if rows == EVERY:
        return some
    return torch.cat([plain[:, : rows.start], some, plain[:, rows.stop :]], 1)


def _rows(touched: Tensor) -> slice:
    """The queries to compute: those from the first to the last touched, where that is under half.

    A rule that edits the last query of a long prompt then costs one row.
    """
    places = touched.flatten(0, 1).any(0).nonzero()[:, 0]
    first, last = int(places[0]), int(places[-1]) + 1
    return slice(first, last) if 2 * (last - first) <= touched.shape[2] else EVERY


def _outputs(edit: Edit, item: Active, output: Tensor | None) -> Tensor | None:
    """The output ``(batch, queries, heads, value size)`` after one rule's `outputs`."""
    before = edit.call.plain() if output is None else output
    index = numbers(item.heads, before.device)
    old = before.index_select(2, index).transpose(1, 2)
    new = item.rule.outputs(item.site(edit), old)
    if new is None:
        item.effects.add("idle")
        return output
    if not isinstance(new, Tensor) or new.shape != old.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise AttnbiasError(
            f"{type(item.rule).__name__}.outputs must return the shape {tuple(old.shape)}, got "
            f"{got}."
        )
    item.effects.add("changed")
    return before.index_copy(2, index, new.to(before.dtype).transpose(1, 2))


def _check_bias(bias: Any, item: Active, edit: Edit) -> None:
    name = type(item.rule).__name__
    if not isinstance(bias, Bias):
        raise AttnbiasError(f"{name}.bias must return a Bias or None, got {type(bias).__name__}.")
    batch, _, queries, keys = edit.shape
    want = (batch, len(item.heads), queries, keys)
    free = (1, 1, None, None)
    if any(a not in (b, c) for a, b, c in zip(bias.shape, want, free, strict=True)):
        raise AttnbiasError(
            f"{name}.bias must return a bias that fits (batch, heads, queries, keys) = {want}, got "
            f"{bias.shape}."
        )


__all__ = ["Active", "Edit", "Edited", "Memory", "edited", "never_skip"]
