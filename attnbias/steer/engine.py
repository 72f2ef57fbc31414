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
from attnbias.bias import Bias, Bucketed, add
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.placing import place, reach, take
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall, Spans

if TYPE_CHECKING:
    from attnbias.hub import Call

TOLERANCE = 1e-4  # how far returned shares may miss the total of their row
# Below this a share has lost its digits (float32 ends at 1e-38), and counts as none.
NO_MASS = {torch.float32: 1e-30, torch.float64: 1e-290}
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
        self.total: Bias | None = None
        self.touched = torch.zeros(
            batch, heads, queries, dtype=torch.bool, device=call.query.device
        )

    def add(self, bias: Bias, heads: Sequence[int]) -> None:
        placed = place(bias, heads, self.shape[1])
        self.total = placed if self.total is None else add(self.total, placed)

    def mark(self, rows: Tensor, heads: Sequence[int]) -> None:
        index = torch.tensor(heads, device=self.touched.device)
        kept = self.touched.index_select(1, index) | rows
        self.touched = self.touched.index_copy(1, index, kept)

    def bias_on(self, heads: Sequence[int]) -> Bias | None:
        """The model's own bias and the edit so far, on some heads."""
        parts = [b for b in (self.call.bias, self.total) if b is not None]
        return add(*(take(b, heads, self.shape[1]) for b in parts)) if parts else None


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
    if edit.total is not None:
        edit.touched = reach(edit.total, call.bias, edit.shape).to(edit.touched.device)
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
    query, key, value = on_heads(call, heads)
    sink = None if call.sink is None else call.sink[heads]
    out = attention(query, key, value, bias=edit.bias_on(heads), scale=call.scale, sink=sink)
    assert isinstance(out, Tensor)
    out = out.transpose(1, 2)
    if bool(edit.touched.all()):
        return out.contiguous()
    plain = call.plain()
    index = torch.tensor(heads, device=plain.device)
    rows = edit.touched.index_select(1, index).transpose(1, 2)[..., None]
    kept = torch.where(rows, out.to(plain.dtype), plain.index_select(2, index))
    return plain.index_copy(2, index, kept)


def on_heads(call: Call, heads: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of some query heads; grouped keys are not repeated where the choice
    allows.
    """
    query, key, value = call.query, call.key, call.value
    total, group = query.shape[1], query.shape[1] // key.shape[1]
    if list(heads) == list(range(total)):
        return query, key, value
    index = torch.tensor(heads, device=query.device)
    counts: dict[int, int] = {}
    for head in heads:
        counts[head // group] = counts.get(head // group, 0) + 1
    even = len(set(counts.values())) == 1
    owners = torch.tensor(
        sorted(counts) if even else [head // group for head in heads], device=query.device
    )
    return query.index_select(1, index), key.index_select(1, owners), value.index_select(1, owners)


def masses(edit: Edit, heads: Sequence[int], groups: Tensor, count: int) -> Tensor:
    """The share of attention that each group gets under the edit so far.

    Attention whose values are the one-hot group numbers: ``(batch, heads, queries, count)``. Half
    formats are computed in float32, since a share near 1 in bfloat16 has no room for its rest.
    """
    call = edit.call
    query, key, _ = on_heads(call, heads)
    kind = query.dtype if query.dtype == torch.float64 else torch.float32
    values = torch.nn.functional.one_hot(groups.long(), count).to(kind)
    if groups.shape[1] > 1 and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    values = values.expand(query.shape[0], key.shape[1], -1, -1)
    sink = None if call.sink is None else call.sink[list(heads)]
    with torch.autocast(query.device.type, enabled=False):
        out = attention(
            query.to(kind),
            key.to(kind),
            values,
            bias=edit.bias_on(heads),
            scale=call.scale,
            sink=sink,
        )
    assert isinstance(out, Tensor)
    return torch.where(out < NO_MASS[kind], 0.0, out)


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
    old = masses(edit, item.heads, groups, count)
    new = item.rule.reallocate(site, old)
    if new is None:
        return
    real = (edit.call.query_positions >= 0)[:, None, :, None]
    table = log_ratio(old, torch.where(real, new.to(old.dtype).expand_as(old), old), name)
    changed = (table.detach() != 0).any(-1)
    if bool(changed.any()):
        edit.add(Bucketed(table, None, groups), item.heads)
        edit.mark(changed, item.heads)


def log_ratio(old: Tensor, new: Tensor, name: str) -> Tensor:
    """``log(new / old)``, the bias that turns old shares into new ones; 0 where nothing changes.

    The total of a row stays as it is, so the model's sink logit and the normalisation stay too.

    Raises:
        AttnbiasError: a share that is negative or not finite, a row with another total, or a share
            for a group that has no mass (none of its keys is visible there).
    """
    with torch.no_grad():
        if not bool(torch.isfinite(new).all()) or bool((new < 0).any()):
            raise AttnbiasError(f"{name}.reallocate returned a share below 0 or not finite.")
        if bool(((new > 0) & (old <= 0)).any()):
            raise AttnbiasError(
                f"{name}.reallocate gives attention to a group that has none: a group whose keys "
                "are all hidden from a query cannot receive; return such rows unchanged."
            )
        miss = float((new.sum(-1) - old.sum(-1)).abs().max()) if new.numel() else 0.0
        if miss > TOLERANCE:
            raise AttnbiasError(
                f"{name}.reallocate must keep the total of each row, got one that is off by "
                f"{miss:.2g}."
            )
    # Logarithms first: the ratio itself may overflow. Equal shares give exactly 0.
    some = torch.where(old > 0, new, 1.0)
    log_new = torch.where(some > 0, torch.where(some > 0, some, 1.0).log(), -torch.inf)
    return log_new - torch.where(old > 0, old, 1.0).log()


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
