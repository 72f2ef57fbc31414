"""Shares of attention without going over the keys twice.

Attention over each group of keys by itself gives the shares (by the log-sum-exps) and, with other
weights, the edited output. Each key is gone through once, so a reallocation costs little more than
the attention that it edits. A few queries (a decoded token) are computed row by row instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.attention import attention, merge
from attnbias.bias import Bias, Causal, Dense, KeyBias, Padding, Window, add
from attnbias.steer.placing import gather, take
from attnbias.steer.shares import on_heads

if TYPE_CHECKING:
    from attnbias.steer.engine import Edit

FEW = 4  # queries that are computed row by row
MANY = 256  # queries from which the groups are computed apart
RUNS = 8  # stretches of keys that are worth a call of their own
HOLES = 8  # the keys outside the largest group are at most this part of all

Part = tuple[Tensor, Tensor]  # output and log-sum-exp


def few(edit: Edit) -> bool:
    """Whether a call has so few queries that whole rows of scores are cheap."""
    return edit.shape[2] <= FEW and not edit.extras


def by_rows(edit: Edit, heads: Sequence[int], values: Tensor | None, kind: torch.dtype) -> Tensor:
    """`Edit.attend` by whole rows of scores, O(queries x keys) memory, in float32 (float64)."""
    call = edit.call
    query, key, value = on_heads(edit, heads)
    result = kind
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, count, queries, _ = query.shape
    grouped = (batch, key.shape[1], -1, query.shape[-1])
    scores = query.to(kind).reshape(grouped) @ key.to(kind).mT
    scores = scores.reshape(batch, count, queries, -1) * call.scale
    for bias in (call.bias, edit.biases):
        if bias is not None:
            scores = scores + take(bias, heads, edit.shape[1]).dense().to(scores)
    for fold in edit.folds:
        index = tuple(fold.heads.index(head) if head in fold.heads else -1 for head in heads)
        groups = gather(fold.groups, index, fill=False).long()[:, :, None]
        scores = scores + gather(fold.table, index).gather(-1, groups.expand_as(scores)).to(kind)
    whole = scores
    if call.sink is not None:
        own = call.sink[list(heads)].to(kind)[None, :, None, None]
        whole = torch.cat([scores, own.expand(batch, count, queries, 1)], -1)
    blind = (whole == -torch.inf).all(-1, keepdim=True)
    shares = torch.where(blind, 0.0, whole).softmax(-1).masked_fill(blind, 0.0)
    shares = shares[..., : scores.shape[-1]]
    if values is not None:
        return (shares @ values.to(kind).expand(batch, -1, -1, -1)).to(result)
    out = shares.reshape(batch, key.shape[1], -1, shares.shape[-1]) @ value.to(kind)
    return out.reshape(batch, count, queries, -1).to(result)


@dataclass(frozen=True)
class Groups:
    """Attention of some heads over each group by itself.

    Attributes:
        outputs: for each group ``(batch, heads, queries, value size)``.
        masses: ``(batch, heads, queries, groups)``: the share of each, the sink's left out.
    """

    heads: tuple[int, ...]
    outputs: tuple[Tensor, ...]
    masses: Tensor

    def output(self, heads: Sequence[int], shares: Tensor) -> Tensor:
        """The output of some of the heads when the groups get other shares."""
        index = torch.tensor([self.heads.index(head) for head in heads], device=shares.device)
        every = list(heads) == list(self.heads)
        found: Tensor | None = None
        for number, part in enumerate(self.outputs):
            own = part if every else part.index_select(1, index)
            share = shares[..., number, None]
            share = share if every else share.index_select(1, index)
            # Below this a share is none, and what it would weigh may be anything.
            term = own.to(shares.dtype) * share
            found = term if found is None else found.add_(term)
        assert found is not None
        return found.to(self.outputs[0].dtype)


def split(edit: Edit, heads: tuple[int, ...], groups: Tensor, count: int) -> Groups | None:
    """The groups one by one, or None where one pass over all keys is better or needed.

    Args:
        groups: ``(batch | 1, heads | 1, keys)``: shared by the heads, else None is returned.
    """
    call = edit.call
    if edit.shape[2] < MANY or edit.extras or edit.folds or groups.shape[1] > 1 or count > RUNS:
        return None
    tensors = on_heads(edit, heads)
    asks = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    if asks or torch.is_autocast_enabled(tensors[0].device.type):
        return None
    described = _described(edit, heads)
    if described is None:
        return None
    same = groups.shape[0] == 1 or bool((groups == groups[:1]).all())
    rows: list[Any] = [slice(None)] if same else [slice(n, n + 1) for n in range(groups.shape[0])]
    found: list[list[Part]] = []
    for row in rows:
        query, key, value = (one[row] for one in tensors)
        own = _Own(query, key, value, described, row, call.scale)
        parts = own.parts(groups[0 if same else row, 0].reshape(-1), count)
        if parts is None:
            return None
        found.append(parts)
    outs = tuple(torch.cat([parts[g][0] for parts in found]) for g in range(count))
    lses = torch.stack([torch.cat([parts[g][1] for parts in found]) for g in range(count)], -1)
    total = lses
    if call.sink is not None:
        own_sink = call.sink[list(heads)].to(lses.dtype)[None, :, None, None]
        total = torch.cat([lses, own_sink.expand(*lses.shape[:3], 1)], -1)
    norm = torch.logsumexp(total, -1, keepdim=True)
    masses = (lses - torch.where(norm == -torch.inf, 0.0, norm)).exp()
    return Groups(heads, outs, masses)


@dataclass(frozen=True)
class _Described:
    """The bias of a call: causal from a position on (or not), and what is added per key."""

    offset: int | None
    keys: Bias | None


def _described(edit: Edit, heads: Sequence[int]) -> _Described | None:
    offset: int | None = None
    rest: list[Bias] = []
    for bias in (edit.call.bias, edit.biases):
        for term in [] if bias is None else bias.terms():
            causal = isinstance(term, Window) and term.before is None and term.after == 0
            if causal and offset is None:
                offset = term.offset
            elif isinstance(term, (KeyBias, Padding)):
                rest.append(take(term, heads, edit.shape[1]))
            else:
                return None
    return _Described(offset, add(*rest) if rest else None)


@dataclass(frozen=True)
class _Own:
    """Query, key and value of one row of the batch (or all), with the biases of the call."""

    query: Tensor
    key: Tensor
    value: Tensor
    described: _Described
    row: slice
    scale: float

    def parts(self, groups: Tensor, count: int) -> list[Part] | None:
        """Output and log-sum-exp of every group."""
        kinds, lengths = torch.unique_consecutive(groups, return_counts=True)
        if len(kinds) <= RUNS:
            stretches: list[list[Part]] = [[] for _ in range(count)]
            start = 0
            for kind, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
                stretches[kind].append(self.stretch(start, start + length))
                start += length
            return [merge(one) if one else self.nothing() for one in stretches]
        sizes = torch.bincount(groups.long(), minlength=count)
        largest = int(sizes.argmax())
        if (len(groups) - int(sizes[largest])) * HOLES > len(groups):
            return None
        return [
            self.holes(groups != kind) if kind == largest else self.picked(groups == kind)
            for kind in range(count)
        ]

    def nothing(self) -> Part:
        shape = self.query.shape[:3]
        lse = torch.promote_types(self.query.dtype, torch.float32)
        none = self.query.new_full(shape, -torch.inf, dtype=lse)
        return self.query.new_zeros(*shape, self.value.shape[-1]), none

    def stretch(self, start: int, stop: int) -> Part:
        """Keys that follow each other."""
        offset, queries = self.described.offset, self.query.shape[2]
        if offset is None:
            return self.block(slice(0, queries), slice(start, stop))
        parts = []
        if start < offset:  # before the first query: seen by all
            parts.append(self.block(slice(0, queries), slice(start, min(stop, offset))))
        first, last = max(start, offset) - offset, min(stop - offset, queries)
        if first < last:
            cols = slice(first + offset, last + offset)
            blocks = [self.nothing_of(first), self.block(slice(first, last), cols, causal=True)]
            if last < queries:
                blocks.append(self.block(slice(last, queries), cols))
            outs, lses = zip(*blocks, strict=True)
            parts.append((torch.cat(outs, 2), torch.cat(lses, 2)))
        return merge(parts) if parts else self.nothing()

    def nothing_of(self, rows: int) -> Part:
        out, lse = self.nothing()
        return out[:, :, :rows], lse[:, :, :rows]

    def block(self, rows: slice, cols: slice, *, causal: bool = False) -> Part:
        """Some queries and some keys: all of them visible, or the square on the diagonal."""
        terms: list[Bias] = []
        count, width = rows.stop - rows.start, cols.stop - cols.start
        if causal:
            terms.append(Causal(count, width, offset=0, device=self.query.device))
        if self.described.keys is not None:
            terms.append(self._per_key(rows, cols))
        return self._attend(rows, cols, terms)

    def holes(self, hidden: Tensor) -> Part:
        """All keys but some."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        weight = torch.zeros(keys, device=hidden.device).masked_fill(hidden, -torch.inf)
        terms: list[Bias] = [KeyBias(weight[None, None])]
        if self.described.offset is not None:
            offset = self.described.offset
            terms.append(Causal(queries, keys, offset=offset, device=hidden.device))
        rows, cols = slice(0, queries), slice(0, keys)
        if self.described.keys is not None:
            terms.append(self._per_key(rows, cols))
        return self._attend(rows, cols, terms)

    def picked(self, chosen: Tensor) -> Part:
        """A few scattered keys, with a mask of their own."""
        index = chosen.nonzero()[:, 0]
        if not len(index):
            return self.nothing()
        queries = self.query.shape[2]
        mask = self.query.new_zeros(1, 1, queries, len(index), dtype=torch.float32)
        if self.described.offset is not None:
            places = torch.arange(queries, device=index.device) + self.described.offset
            mask = mask.masked_fill(index > places[:, None], -torch.inf)
        if self.described.keys is not None:
            every = self._per_key(slice(0, queries), slice(0, self.key.shape[2]))
            one = every[:, :, 0:1, :].dense().index_select(-1, index)
            mask = mask + one.to(mask.dtype)
        key, value = self.key.index_select(2, index), self.value.index_select(2, index)
        found = attention(
            self.query, key, value, bias=Dense(mask), scale=self.scale, return_lse=True
        )
        assert isinstance(found, tuple)
        return found

    def _per_key(self, rows: slice, cols: slice) -> Bias:
        assert self.described.keys is not None
        bias = self.described.keys
        return bias[self.row if bias.batch > 1 else slice(None), :, rows, cols]

    def _attend(self, rows: slice, cols: slice, terms: list[Bias]) -> Part:
        found = attention(
            self.query[:, :, rows],
            self.key[:, :, cols],
            self.value[:, :, cols],
            bias=add(*terms) if terms else None,
            scale=self.scale,
            return_lse=True,
        )
        assert isinstance(found, tuple)
        return found
