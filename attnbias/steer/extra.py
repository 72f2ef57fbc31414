"""Edited queries, keys and values of one call: how a rule's `Vectors` enter the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.attention import attention
from attnbias.errors import AttnbiasError
from attnbias.steer.hooks import Vectors
from attnbias.steer.placing import gather, numbers
from attnbias.steer.shares import query_on, repeat

if TYPE_CHECKING:
    from attnbias.steer.edit import Active, Edit


@dataclass(frozen=True)
class Extra:
    """Keys and values ``(batch | 1, heads | 1, extra, dim)`` that some heads see besides."""

    key: Tensor
    value: Tensor
    heads: tuple[int, ...]

    def attend(
        self, query: Tensor, value: Tensor, heads: Sequence[int], scale: float, masses: bool
    ) -> tuple[Tensor, Tensor]:
        """Attention of `heads` over these keys alone; empty for the heads that do not see them.

        masses: the values asked for are groups of the model's keys, to which these belong not.
        """
        index = tuple(self.heads.index(head) if head in self.heads else -1 for head in heads)
        key, own = gather(self.key, index), gather(self.value, index)
        batch, count = query.shape[0], len(heads)
        key = key.to(query.dtype).expand(batch, count, -1, -1)
        own = own.to(value.dtype).expand(batch, count, -1, -1)
        if masses:
            own = value.new_zeros(batch, count, key.shape[2], value.shape[-1])
        out, lse = attention(query, key, own, scale=scale, return_lse=True)
        blind = torch.tensor([number < 0 for number in index], device=query.device)[:, None]
        return out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)

    def scores(self, query: Tensor, heads: Sequence[int], scale: float) -> Tensor:
        """Scaled scores of all queries ``(batch, heads, queries, extra)``, -inf for other heads.

        query: on all heads of the layer.
        """
        index = tuple(self.heads.index(head) if head in self.heads else -1 for head in heads)
        kind = torch.float64 if query.dtype == torch.float64 else torch.float32
        own = query.index_select(1, numbers(tuple(heads), query.device)).to(kind)
        found = own @ gather(self.key, index).to(kind).mT * scale
        blind = torch.tensor([number < 0 for number in index], device=query.device)
        return found.masked_fill(blind[:, None, None], -torch.inf)


def apply(edit: Edit, item: Active) -> None:
    """Ask a rule for its vectors and put them in place."""
    site = item.site(edit)
    found = item.rule.vectors(site)
    if found is None:
        item.effects.add("idle")
        return
    name = type(item.rule).__name__
    if not isinstance(found, Vectors):
        raise AttnbiasError(
            f"{name}.vectors must return Vectors or None, got {type(found).__name__}."
        )
    item.effects.add("changed")
    total = edit.shape[1]
    index = numbers(item.heads, edit.query.device)
    if found.query is not None:
        old = query_on(edit, item.heads)
        new = _checked(found.query, old, f"{name}.vectors: query")
        edit.mark((new != old).any(-1), item.heads)
        whole = item.heads == tuple(range(total))
        edit.query = new if whole else edit.query.index_copy(1, index, new)
    if found.key is not None or found.value is not None:
        keys, values = repeat(edit.key, total), repeat(edit.value, total)
        olds = keys.index_select(1, index), values.index_select(1, index)
        news = [
            old if new is None else _checked(new, old, f"{name}.vectors: {word}")
            for word, new, old in zip(("key", "value"), (found.key, found.value), olds, strict=True)
        ]
        moved = [(new != old).flatten(2).any(-1) for new, old in zip(news, olds, strict=True)]
        edit.mark((moved[0] | moved[1])[..., None].expand(-1, -1, edit.shape[2]), item.heads)
        edit.key = keys.index_copy(1, index, news[0])
        edit.value = values.index_copy(1, index, news[1])
    if found.extra_key is not None and found.extra_value is not None:
        for word, given, size in (
            ("extra_key", found.extra_key, edit.key.shape[-1]),
            ("extra_value", found.extra_value, edit.value.shape[-1]),
        ):
            want = (edit.shape[0], len(item.heads), found.extra_key.shape[-2], size)
            fits = given.ndim == 4 and given.shape[2:] == want[2:]
            if not fits or any(
                a not in (1, b) for a, b in zip(given.shape[:2], want[:2], strict=True)
            ):
                raise AttnbiasError(
                    f"{name}.vectors: {word} must fit (batch | 1, heads | 1, extra, dim) = {want}, "
                    f"got {tuple(given.shape)}."
                )
        if found.extra_key.shape[2]:
            edit.extras.append(Extra(found.extra_key, found.extra_value, item.heads))
            edit.mark(torch.ones_like(edit.touched[:, :1]), item.heads)


def _checked(new: Tensor, old: Tensor, what: str) -> Tensor:
    if not isinstance(new, Tensor) or new.shape != old.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        raise AttnbiasError(f"{what} must have the shape {tuple(old.shape)}, got {got}.")
    return new.to(old.dtype)
