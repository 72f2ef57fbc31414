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
    from attnbias.hub import Call
    from attnbias.steer.engine import Edit

FEW = 4  # queries that are computed row by row
MANY = 256  # queries from which the groups are computed apart
MANY_OWN = 1024  # the same where each head has groups of its own: small calls for each
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
        groups: ``(batch | 1, heads | 1, keys)``. Where heads have groups of their own, one must be
            most of every head's keys.
    """
    call = edit.call
    own = groups.shape[1] > 1
    if edit.shape[2] < (MANY_OWN if own else MANY) or edit.extras or edit.folds or count > RUNS:
        return None
    tensors = on_heads(edit, heads)
    asks = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    if asks or torch.is_autocast_enabled(tensors[0].device.type):
        return None
    described = _described(edit, heads)
    if described is None:
        return None
    if own:
        of_heads = _of_heads(tensors, groups, count, described, call.scale)
        return None if of_heads is None else _made(call, heads, of_heads)
    same = groups.shape[0] == 1 or bool((groups == groups[:1]).all())
    rows: list[Any] = [slice(None)] if same else [slice(n, n + 1) for n in range(groups.shape[0])]
    found: list[list[Part]] = []
    for row in rows:
        query, key, value = (one[row] for one in tensors)
        lane = _Own(query, key, value, described, row, call.scale)
        parts = lane.parts(groups[0 if same else row, 0].reshape(-1), count)
        if parts is None:
            return None
        found.append(parts)
    joined = [
        (torch.cat([parts[g][0] for parts in found]), torch.cat([parts[g][1] for parts in found]))
        for g in range(count)
    ]
    return _made(call, heads, joined)


def _made(call: Call, heads: tuple[int, ...], parts: Sequence[Part]) -> Groups:
    """Groups with their shares, from the output and log-sum-exp of each."""
    lses = torch.stack([lse for _, lse in parts], -1)
    total = lses
    if call.sink is not None:
        own_sink = call.sink[list(heads)].to(lses.dtype)[None, :, None, None]
        total = torch.cat([lses, own_sink.expand(*lses.shape[:3], 1)], -1)
    norm = torch.logsumexp(total, -1, keepdim=True)
    masses = (lses - torch.where(norm == -torch.inf, 0.0, norm)).exp()
    return Groups(heads, tuple(out for out, _ in parts), masses)


def _of_heads(
    tensors: tuple[Tensor, Tensor, Tensor],
    groups: Tensor,
    count: int,
    described: _Described,
    scale: float,
) -> list[Part] | None:
    """Groups of each head: the largest in one call that hides the rest, these head by head."""
    query, key, value = tensors
    batch, heads = query.shape[:2]
    largest = int(torch.bincount(groups.flatten().long(), minlength=count).argmax())
    rest = groups != largest
    if int(rest.sum(-1).max()) * HOLES > key.shape[2]:
        return None
    whole = _Own(query, key, value, described, slice(None), scale)
    parts = {largest: whole.holes(rest)}
    group = heads // key.shape[1]
    for number in range(count):
        if number == largest:
            continue
        if not bool((groups == number).any()):
            parts[number] = whole.nothing()
            continue
        rows = []
        for row in (slice(n, n + 1) for n in range(batch)):
            lane = []
            for head in range(heads):
                one, its = slice(head, head + 1), slice(head // group, head // group + 1)
                chosen = groups[row if groups.shape[0] > 1 else 0, head].reshape(-1) == number
                own = _Own(
                    query[row, one], key[row, its], value[row, its], described.of(head), row, scale
                )
                lane.append(own.picked(chosen))
            rows.append([torch.cat(both, 1) for both in zip(*lane, strict=True)])
        out, lse = (torch.cat(both) for both in zip(*rows, strict=True))
        parts[number] = (out, lse)
    return [parts[number] for number in range(count)]


@dataclass(frozen=True)
class _Described:
    """The bias of a call: causal from a position on (or not), and what is added per key."""

    offset: int | None
    keys: Bias | None

    def of(self, head: int) -> _Described:
        """The same for one head."""
        if self.keys is None or self.keys.heads == 1:
            return self
        return _Described(self.offset, self.keys[:, head : head + 1, :, :])


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
        """All keys but some: hidden ``(keys)`` or ``(batch | 1, heads, keys)``."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        weight = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, -torch.inf)
        terms: list[Bias] = [KeyBias(weight if weight.ndim == 3 else weight[None, None])]
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
