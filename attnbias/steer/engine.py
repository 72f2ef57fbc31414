"""The engine of `steer`: one attention call, edited by every rule in force, exactly.

Order: the biases of all rules of all nested contexts are summed; then the reallocations in the
order given (an outer context first), each seeing the shares after the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.attention import attention
from attnbias.bias import Bias, add
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.placing import place, reach, take
from attnbias.steer.rule import Rule
from attnbias.steer.shares import NO_MASS, Fold, log_ratio, on_heads, repeat
from attnbias.steer.site import SiteCall, Spans

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

    def site(self, call: Call) -> SiteCall:
        return SiteCall(call, self.heads, self.spans)


class Edit:
    """The edit in the making: the summed bias on all heads, and the rows that it changes."""

    def __init__(self, call: Call) -> None:
        self.call = call
        batch, heads, queries, _ = call.query.shape
        self.shape = (batch, heads, queries, call.key.shape[2])
        self.biases: Bias | None = None
        self.folds: list[Fold] = []
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

    def mark(self, rows: Tensor, heads: Sequence[int]) -> None:
        index = torch.tensor(heads, device=self.touched.device)
        kept = self.touched.index_select(1, index) | rows
        self.touched = self.touched.index_copy(1, index, kept)

    def attend(self, heads: Sequence[int], values: Tensor | None = None) -> Tensor:
        """Attention of some heads under the edit so far, with the model's values or others.

        Args:
            values: ``(batch | 1, 1 | heads, keys, size)`` instead of the model's, in float32
                (float64): the attention is then computed in that format, whatever the model's is.
        """
        call = self.call
        query, key, value = on_heads(call, heads)
        kind = query.dtype if values is None else values.dtype
        device = query.device.type
        if values is None and torch.is_autocast_enabled(device) and kind != torch.float64:
            kind = torch.get_autocast_dtype(device)
        query, key = query.to(kind), key.to(kind)
        if values is None:
            value = value.to(kind)
        else:
            if values.shape[1] > 1:
                key = repeat(key, len(heads))
            value = values.expand(query.shape[0], key.shape[1], -1, -1)
        for fold in self.folds:
            query, key, value = fold.apply(query, key, value, heads, call.scale)
        parts = [b for b in (call.bias, self.biases) if b is not None]
        bias = add(*(take(b, heads, self.shape[1]) for b in parts)) if parts else None
        sink = None if call.sink is None else call.sink[list(heads)]
        with torch.autocast(device, enabled=False):
            out = attention(query, key, value, bias=bias, scale=call.scale, sink=sink)
        assert isinstance(out, Tensor)
        return out


def edited(call: Call, active: Sequence[Active]) -> tuple[Tensor | None, Bias | None]:
    """The output of one call under the rules, and the sum of their edits as a log-bias.

    Returns:
        ``(output (batch, queries, heads, value size), bias)``; ``(None, None)`` where no row is
        changed: the plain output then stands. Rows that no rule changes (heads, batch rows, query
        rows that see no chosen key, padding) are the plain output, bit for bit.
    """
    edit = Edit(call)
    for item in active:
        bias = item.rule.bias(item.site(call))
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
        edit.touched = reach(edit.biases, call.bias, edit.shape).to(edit.touched.device)
    for item in active:
        if item.rule.reallocates:
            _reallocate(edit, item)
    if not _SKIP:
        for item in active:
            edit.mark(torch.ones_like(edit.touched[:, :1]), item.heads)
    edit.touched = edit.touched & (call.query_positions >= 0)[:, None, :]
    if not bool(edit.touched.any()):
        return None, None
    if call.training and call.dropout > 0:
        raise Refused(
            f"{call.site} trains with attention dropout {call.dropout:g}, which an edited call "
            "cannot apply: set the dropout to 0 in the model's config, or write model.eval()."
        )
    return _output(edit), edit.total


def _output(edit: Edit) -> Tensor:
    call = edit.call
    everywhere = edit.touched.any(2).any(0)
    heads = everywhere.nonzero()[:, 0].tolist()
    out = edit.attend(heads).transpose(1, 2)
    if bool(edit.touched.all()):
        return out.contiguous()
    plain = call.plain()
    index = torch.tensor(heads, device=plain.device)
    rows = edit.touched.index_select(1, index).transpose(1, 2)[..., None]
    kept = torch.where(rows, out.to(plain.dtype), plain.index_select(2, index))
    return plain.index_copy(2, index, kept)


def _reallocate(edit: Edit, item: Active) -> None:
    site = item.site(edit.call)
    groups = item.rule.groups(site)
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
    old = edit.attend(item.heads, torch.nn.functional.one_hot(groups.long(), count).to(kind))
    old = torch.where(old < NO_MASS[kind], 0.0, old)
    new = item.rule.reallocate(site, old)
    if new is None:
        return
    real = (edit.call.query_positions >= 0)[:, None, :, None]
    table = log_ratio(old, torch.where(real, new.to(old.dtype).expand_as(old), old), name)
    changed = (table.detach() != 0).any(-1)
    if bool(changed.any()):
        edit.folds.append(Fold(table, groups, item.heads))
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
