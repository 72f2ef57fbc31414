"""The engine of `steer`: one attention call, edited by every rule in force, exactly.

Order: the biases of all rules of all nested contexts are summed; then the reallocations in the
order given (an outer context first), each seeing the shares after the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnbias.attention import attention, merge
from attnbias.bias import Bias, add
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer import extra
from attnbias.steer.extra import Extra
from attnbias.steer.partial import Groups, by_rows, few, split
from attnbias.steer.placing import place, reach, take
from attnbias.steer.rule import Rule
from attnbias.steer.shares import NO_MASS, Fold, log_ratio, on_heads, repeat
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Spans

if TYPE_CHECKING:
    from attnbias.hub import Call, Site
    from attnbias.steer.branch import Lane

_SKIP = True
EVERY = slice(None)


@contextmanager
def never_skip() -> Iterator[None]:
    """For tests: rows that nothing changes are computed by the edited path too."""
    global _SKIP
    _SKIP = False
    try:
        yield
    finally:
        _SKIP = True


@dataclass
class Memory:
    """What one rule keeps between calls.

    frozen: by (site, name), with the batch it was made for; made anew in every prefill call.
    looked: by site, what `look` returned in the forward that runs.
    state: what the rule's `decode` has put there for its other hooks.
    branch: gives the rule's branches by name; None inside a branch.
    inside: the name of the branch whose calls the rule looks at, empty outside of its own.
    """

    frozen: dict[Any, Any] = field(default_factory=dict)
    looked: dict[Site, Any] = field(default_factory=dict)
    state: dict[Any, Any] = field(default_factory=dict)
    branch: Callable[[str], Lane] | None = None
    inside: str = ""


@dataclass(frozen=True)
class Active:
    """A rule that acts at this call, with its heads and spans, and what became of it so far.

    effects: "changed" once a hook gave an edit, "idle" where it had none to give, "missed" where
    its bias was zero everywhere (none of its keys was there).
    """

    rule: Rule
    heads: tuple[int, ...]
    spans: Spans
    effects: set[str]
    memory: Memory
    looks_only: bool = False  # in a branch of its own

    def uses(self, hook: str) -> bool:
        return (hook == "look" or not self.looks_only) and self.rule.uses(hook)

    def site(self, edit: Edit) -> SiteCall:
        return SiteCall(edit, self.heads, self.spans, self.memory)


class Edited(NamedTuple):
    """What came of a call.

    Attributes:
        output: ``(batch, queries, heads, value size)``, None for the plain output.
        extra: the sum of the edits as a log-bias on all heads, None where there is none.
        call: the call as those who look must see it, with edited queries, keys and values.
        unseen: why nobody can look at this call, empty where they can.
    """

    output: Tensor | None
    extra: Bias | None
    call: Call
    unseen: str = ""


class Edit:
    """The edit in the making: the summed bias on all heads, and the rows that it changes."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.query, self.key, self.value = call.query, call.key, call.value
        self.extras: list[Extra] = []
        batch, heads, queries, _ = call.query.shape
        self.shape = (batch, heads, queries, call.key.shape[2])
        self.biases: Bias | None = None
        self.folds: list[Fold] = []
        # The groups of the one reallocation, and the shares that it gave them.
        self.apart: tuple[Groups, Tensor] | None = None
        self.touched = torch.zeros(
            batch, heads, queries, dtype=torch.bool, device=call.query.device
        )

    def add(self, bias: Bias, heads: Sequence[int]) -> None:
        placed = place(bias, heads, self.shape[1])
        self.biases = placed if self.biases is None else add(self.biases, placed)

    @property
    def total(self) -> Bias | None:
        """The whole edit as a log-bias on all heads."""
        parts = [place(fold.bias(), fold.heads, self.shape[1]) for fold in self.folds]
        parts = [*([] if self.biases is None else [self.biases]), *parts]
        return add(*parts) if parts else None

    def seen(self) -> tuple[Call, str]:
        """The call with the edited vectors, and why nobody can look at it (or nothing)."""
        call = self.call
        if any(new is not old for new, old in ((self.query, call.query), (self.key, call.key))):
            call = call.with_vectors(self.query, self.key, self.value)
        why = f"{call.site} sees keys that a rule adds, which statistics cannot show."
        return call, why if self.extras else ""

    def mark(self, rows: Tensor, heads: Sequence[int]) -> None:
        index = torch.tensor(heads, device=self.touched.device)
        kept = self.touched.index_select(1, index) | rows
        self.touched = self.touched.index_copy(1, index, kept)

    def attend(
        self, heads: Sequence[int], values: Tensor | None = None, rows: slice = EVERY
    ) -> Tensor:
        """Attention of some heads under the edit so far, with the model's values or others.

        Args:
            rows: only these queries.
            values: ``(batch | 1, 1 | heads, keys, size)`` instead of the model's, in float32
                (float64): the attention is then computed in that format, whatever the model's is.
        """
        call = self.call
        query, key, value = on_heads(self, heads)
        query = query[:, :, rows]
        kind = query.dtype if values is None else values.dtype
        device = query.device.type
        if values is None and torch.is_autocast_enabled(device) and kind != torch.float64:
            kind = torch.get_autocast_dtype(device)
        if few(self):
            return by_rows(self, heads, values, kind)[:, :, rows]
        query, key = query.to(kind), key.to(kind)
        if values is None:
            value = value.to(kind)
        else:
            if values.shape[1] > 1:
                key = repeat(key, len(heads))
            value = values.expand(query.shape[0], key.shape[1], -1, -1)
        plain_query = query
        for fold in self.folds:
            part = Fold(fold.table[:, :, rows], fold.groups, fold.heads)
            query, key, value = part.apply(query, key, value, heads, call.scale)
        terms = [b for b in (call.bias, self.biases) if b is not None]
        bias = add(*(take(b, heads, self.shape[1]) for b in terms)) if terms else None
        if bias is not None and rows != EVERY:
            bias = bias[..., rows, :]
        sink = None if call.sink is None else call.sink[list(heads)]
        with torch.autocast(device, enabled=False):
            if not self.extras:
                out = attention(query, key, value, bias=bias, scale=call.scale, sink=sink)
                assert isinstance(out, Tensor)
                return out
            own = attention(
                query, key, value, bias=bias, scale=call.scale, sink=sink, return_lse=True
            )
            assert isinstance(own, tuple)
            parts = [own]
            for more in self.extras:
                masses = values is not None
                parts.append(more.attend(plain_query, value, heads, call.scale, masses))
            return merge(parts)[0]


def edited(call: Call, active: Sequence[Active]) -> Edited:
    """What becomes of one call under the rules.

    Rows that no rule changes (heads, batch rows, query rows that see no chosen key, padding) are
    the plain output, bit for bit; where no row is changed the output is None.
    """
    edit = Edit(call)
    for item in active:
        if item.uses("vectors"):
            extra.apply(edit, item)
    for item in active:
        if not item.uses("bias"):
            continue
        bias = item.rule.bias(item.site(edit))
        if bias is None:
            item.effects.add("idle")
            continue
        _check_bias(bias, item, edit)
        edit.add(bias, item.heads)
        if "changed" not in item.effects:
            parts = bias.parameters()
            some = not parts or any(bool((part != 0).any()) for part in parts)
            item.effects.add("changed" if some else "missed")
    if edit.biases is not None:
        reached = reach(edit.biases, call.bias, edit.shape)
        edit.touched = edit.touched | reached.to(edit.touched.device)
    for item in active:
        if item.uses("reallocate"):
            _reallocate(edit, item)
    if not _SKIP:
        for item in active:
            edit.mark(torch.ones_like(edit.touched[:, :1]), item.heads)
    edit.touched = edit.touched & (call.query_positions >= 0)[:, None, :]
    output = _output(edit) if bool(edit.touched.any()) else None
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
    return Edited(output, edit.total if bool(edit.touched.any()) else None, *edit.seen())


def _output(edit: Edit) -> Tensor:
    call = edit.call
    everywhere = edit.touched.any(2).any(0)
    heads = everywhere.nonzero()[:, 0].tolist()
    if bool(edit.touched.all()):
        return _attended(edit, heads, EVERY).contiguous()
    rows = _rows(edit.touched)
    out = _attended(edit, heads, rows)
    plain = call.plain_where(~edit.touched)
    index = torch.tensor(heads, device=plain.device)
    chosen = edit.touched[:, :, rows].index_select(1, index).transpose(1, 2)[..., None]
    some = plain[:, rows]
    kept = torch.where(chosen, out.to(plain.dtype), some.index_select(2, index))
    some = some.index_copy(2, index, kept)
    if rows == EVERY:
        return some
    return torch.cat([plain[:, : rows.start], some, plain[:, rows.stop :]], 1)


def _attended(edit: Edit, heads: Sequence[int], rows: slice) -> Tensor:
    """The edited attention ``(batch, rows, heads, value size)``."""
    if edit.apart is not None and set(heads) <= set(edit.apart[0].heads):
        groups, shares = edit.apart
        return groups.output(heads, shares)[:, :, rows].transpose(1, 2)
    return edit.attend(heads, rows=rows).transpose(1, 2)


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
    index = torch.tensor(item.heads, device=before.device)
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


def _reallocate(edit: Edit, item: Active) -> None:
    site = item.site(edit)
    groups = item.rule.groups(site)
    if groups is None:
        item.effects.add("idle")
        return
    name = type(item.rule).__name__
    want = (site.shape[0], site.shape[1], site.shape[3])
    fits = (
        isinstance(groups, Tensor)
        and not groups.is_floating_point()
        and groups.ndim == 3
        and all(a in (1, b) for a, b in zip(groups.shape[:2], want[:2], strict=True))
        and groups.shape[2] == want[2]
    )
    if not fits:
        got = tuple(groups.shape) if isinstance(groups, Tensor) else type(groups).__name__
        raise AttnbiasError(
            f"{name}.groups must return integers that fit (batch, heads, keys) = {want}, got {got}."
        )
    count = item.rule.group_count(site, groups)
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise AttnbiasError(
            f"{name}.groups must hold numbers from 0 to {count - 1}, got {int(groups.min())} to "
            f"{int(groups.max())}."
        )
    kind = site.dtype
    apart = split(edit, item.heads, groups, count)
    if apart is None:
        columns = torch.nn.functional.one_hot(groups.long(), count).to(kind)
        old = edit.attend(item.heads, columns)
    else:
        old = apart.masses.to(kind)
    old = torch.where(old < NO_MASS[kind], 0.0, old)
    new = item.rule.reallocate(site, old)
    if new is None:
        item.effects.add("idle")
        return
    real = (edit.call.query_positions >= 0)[:, None, :, None]
    new = torch.where(real, new.to(old.dtype).expand_as(old), old)
    table = log_ratio(old, new, name)
    changed = (table.detach() != 0).any(-1)
    item.effects.add("changed" if bool(changed.any()) else "missed")
    if bool(changed.any()):
        edit.folds.append(Fold(table, groups, item.heads))
        edit.apart = None if apart is None else (apart, new)
        edit.mark(changed, item.heads)


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
