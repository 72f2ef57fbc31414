"""Few queries (a decoded token): whole rows of attention weights, edited as they are.

A row of weights is as long as the cache, so it is cheap to hold, and keys and values are read once
each: shares of groups are sums over the row, and a reallocation multiplies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.steer.placing import gather, numbers, take
from attnbias.steer.shares import Fold

if TYPE_CHECKING:
    from attnbias.steer.edit import Edit

FEW = 4  # queries that are computed row by row


def few(edit: Edit) -> bool:
    """Whether a call has so few queries that whole rows of scores are cheap."""
    return edit.shape[2] <= FEW and not edit.extras


class Lines:
    """Rows of weights of some heads under an edit: O(heads x queries x keys) memory, in float32
    (float64).

    All query heads that share a key head are computed together, and the wanted ones taken from
    them: keys and values are read in place.
    """

    def __init__(self, edit: Edit, heads: Sequence[int]) -> None:
        query, key, self._value = edit.query, edit.key, edit.value
        self._total = query.shape[1]
        group = self._total // key.shape[1]
        owners = sorted({head // group for head in heads})
        self.heads: tuple[int, ...] = tuple(range(self._total))
        if len(owners) < key.shape[1]:
            self.heads = tuple(o * group + n for o in owners for n in range(group))
            index = numbers(tuple(owners), key.device)
            query = query.index_select(1, numbers(self.heads, key.device))
            key, self._value = (t.index_select(1, index) for t in (key, self._value))
        kind = torch.float64 if query.dtype == torch.float64 else torch.float32
        batch, count, queries, size = query.shape
        grouped = query.to(kind).reshape(batch, key.shape[1], -1, size)
        keys = key.shape[2]
        grouped = grouped * edit.call.scale
        scores = torch.matmul(grouped, key.to(kind).mT).reshape(batch, count, queries, keys)
        for bias in (edit.call.bias, edit.biases):
            if bias is not None:
                scores = scores + take(bias, self.heads, self._total).dense().to(scores)
        whole, sink = scores, edit.call.sink
        if sink is not None:
            own = sink[list(self.heads)].to(kind)[None, :, None, None]
            whole = torch.cat([scores, own.expand(batch, count, queries, 1)], -1)
        blind = None
        if not keys or any(b is not None and b.may_mask for b in (edit.call.bias, edit.biases)):
            blind = (whole == -torch.inf).all(-1, keepdim=True)
        if blind is not None and bool(blind.any()):
            shares = torch.where(blind, 0.0, whole).softmax(-1).masked_fill(blind, 0.0)
        else:
            shares = whole.softmax(-1)
        self.shares = shares if sink is None else shares[..., :keys]
        for fold in edit.folds:
            self.fold(fold)

    def has(self, heads: Sequence[int]) -> bool:
        return len(self.heads) == self._total or set(heads) <= set(self.heads)

    def fold(self, fold: Fold) -> None:
        """Give the groups of some heads other shares."""
        index = tuple(fold.heads.index(h) if h in fold.heads else -1 for h in self.heads)
        if index == tuple(range(len(self.heads))):
            table, groups = fold.table, fold.groups
        else:
            table, groups = gather(fold.table, index), gather(fold.groups, index, fill=False)
        groups = groups.long()[:, :, None].expand_as(self.shares)
        ratio = table.exp().to(self.shares.dtype)
        self.shares = self.shares * ratio.gather(-1, groups)

    def attend(self, heads: Sequence[int], values: Tensor | None) -> Tensor:
        """The weights times the model's values, or others ``(batch | 1, 1 | heads, keys, size)``.

        Returns:
            ``(batch, heads, queries, size)`` in float32 (float64).
        """
        if values is not None:
            return self._chosen(self.shares, heads) @ values.to(self.shares.dtype)
        batch, count, queries, keys = self.shares.shape
        value = self._value.to(self.shares.dtype)
        grouped = self.shares.reshape(batch, value.shape[1], -1, keys)
        out = torch.matmul(grouped, value).reshape(batch, count, queries, -1)
        return self._chosen(out, heads)

    def _chosen(self, tensor: Tensor, heads: Sequence[int]) -> Tensor:
        if tuple(heads) == self.heads:
            return tensor
        index = tuple(self.heads.index(head) for head in heads)
        return tensor.index_select(1, numbers(index, tensor.device))
