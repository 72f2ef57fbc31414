"""The edit of one attention call in the making, and what the rules of a context keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnbias.attention import attention, merge
from attnbias.bias import Bias, add
from attnbias.steer.extra import Extra
from attnbias.steer.groups import Groups
from attnbias.steer.lines import Lines, few
from attnbias.steer.placing import numbers, place, take
from attnbias.steer.rule import Rule, implements
from attnbias.steer.shares import Fold, on_heads, repeat
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Spans

if TYPE_CHECKING:
    from attnbias.hub import Call, Site
    from attnbias.steer.branch import Lane

EVERY = slice(None)


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
        return (hook == "look" or not self.looks_only) and implements(type(self.rule), hook)

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
        self._touched: Tensor | None = None
        self._lines: Lines | None = None

    @property
    def touched(self) -> Tensor:
        """The rows that are changed: bool ``(batch, heads, queries)``."""
        if self._touched is None:
            batch, heads, queries, _ = self.shape
            self._touched = torch.zeros(
                batch, heads, queries, dtype=torch.bool, device=self.query.device
            )
        return self._touched

    @touched.setter
    def touched(self, rows: Tensor) -> None:
        self._touched = rows

    @property
    def vectors_stay(self) -> bool:
        """Whether queries, keys and values are the model's own."""
        call = self.call
        same = self.query is call.query and self.key is call.key and self.value is call.value
        return same and not self.extras

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
        if len(heads) == self.shape[1]:
            self.touched = self.touched | rows
            return
        index = numbers(tuple(heads), self.touched.device)
        kept = self.touched.index_select(1, index) | rows
        self.touched = self.touched.index_copy(1, index, kept)

    def fold(self, fold: Fold) -> None:
        """One reallocation more."""
        self.folds.append(fold)
        if self._lines is not None:
            self._lines.fold(fold)

    # Attention under the edit so far --------------------------------------------------------------

    def lines(self, heads: Sequence[int]) -> Lines:
        """Whole rows of weights, for a call of few queries; all folds in them."""
        if self._lines is None or not self._lines.has(heads):
            self._lines = Lines(self, heads)
        return self._lines

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
        kind = self.query.dtype if values is None else values.dtype
        device = self.query.device.type
        if values is None and torch.is_autocast_enabled(device) and kind != torch.float64:
            kind = torch.get_autocast_dtype(device)
        if few(self):
            return self.lines(heads).attend(heads, values)[:, :, rows].to(kind)
        query, key, value = on_heads(self, heads)
        query = query[:, :, rows]
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
