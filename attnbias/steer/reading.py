"""Scores, maps and statistics of one call, as the hooks of a rule read them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.errors import Refused
from attnbias.steer.placing import numbers, take
from attnbias.steer.shares import on_heads

if TYPE_CHECKING:
    from attnbias.observe.scene import Scene
    from attnbias.steer.edit import Edit

Rows = Tensor | slice | None  # queries: their numbers (batch, count), a slice, or all


def scores(edit: Edit, heads: Sequence[int], rows: Rows, biases: Sequence[Bias]) -> Tensor:
    """Scaled scores plus biases of all heads: ``(batch, heads, rows, keys)``, float32 (float64)."""
    query, key, _ = on_heads(edit, heads)
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    query, key = picked(query, rows).to(kind), key.to(kind)
    batch, count, length, size = query.shape
    # Heads that share keys in one product: no copies of the keys.
    grouped = query.reshape(batch, key.shape[1], -1, size) @ key.mT
    found = grouped.reshape(batch, count, length, -1) * edit.call.scale
    for bias in biases:
        found = found + _entries(take(bias, heads, edit.shape[1]), rows).to(kind)
    return found


def attention(edit: Edit, heads: Sequence[int], rows: Rows) -> Tensor:
    """The share of each of the model's keys under the edit so far."""
    call, total = edit.call, edit.total
    own = scores(edit, heads, rows, [bias for bias in (call.bias, total) if bias is not None])
    rest = []
    if call.sink is not None:
        sink = call.sink[list(heads)].to(own.dtype)[None, :, None, None]
        rest.append(sink.expand(*own.shape[:3], 1))
    for extra in edit.extras:
        rest.append(picked(extra.scores(edit.query, heads, call.scale), rows))
    whole = torch.cat([own, *rest], -1)
    blind = (whole == -torch.inf).all(-1, keepdim=True)
    found = torch.where(blind, 0.0, whole).softmax(-1).masked_fill(blind, 0.0)
    return found[..., : own.shape[-1]]


def scene(edit: Edit, heads: Sequence[int]) -> Scene:
    """The call as statistics see it.

    Raises:
        Refused: a rule has added keys.
    """
    from attnbias.observe.scene import Scene

    call = edit.call
    if edit.extras:
        raise Refused(f"{call.site} sees keys that a rule adds, which statistics cannot show.")
    query, key, value = on_heads(edit, heads)
    view: Any = SimpleNamespace(
        site=call.site,
        query=query,
        key=key,
        value=value,
        scale=call.scale,
        sink=None if call.sink is None else call.sink[list(heads)],
        bias=None if call.bias is None else take(call.bias, heads, edit.shape[1]),
        query_positions=call.query_positions,
        key_positions=call.key_positions,
    )
    extra, lse = edit.total, None
    grad = any(one.requires_grad for one in (call.query, call.key, call.value))
    if extra is None and edit.vectors_stay and query.shape[2] > 1 and not grad:
        lse = call.plain_with_lse()[1]  # the plain output is wanted in any case
        if lse is not None and len(heads) < lse.shape[1]:
            lse = lse.index_select(1, numbers(tuple(heads), lse.device))
    return Scene(view, None if extra is None else take(extra, heads, edit.shape[1]), lse)


def picked(tensor: Tensor, rows: Rows) -> Tensor:
    """Chosen queries of ``(batch, heads, queries, size)``."""
    if not isinstance(rows, Tensor):
        return tensor[:, :, slice(None) if rows is None else rows]
    index = rows[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
    return tensor.gather(2, index)


def _entries(bias: Bias, rows: Rows) -> Tensor:
    every = slice(None)
    if not isinstance(rows, Tensor):
        return bias[every, every, every if rows is None else rows, every].dense()
    parts = []
    for number, chosen in enumerate(rows.tolist()):
        own = slice(number, number + 1) if bias.batch > 1 else every
        lines = [bias[own, every, row : row + 1, every].dense() for row in chosen]
        parts.append(torch.cat(lines, 2))
    return torch.cat(parts)
