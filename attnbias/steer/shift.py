"""Biases per key and other queries: one call of the model's own operator, bit for bit where
nothing changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.bias import KeyBias
from attnbias.hub.shifted import shifted
from attnbias.hub.stock import split_bias

if TYPE_CHECKING:
    from attnbias.hub import Call
    from attnbias.steer.edit import Edit


def shift(edit: Edit) -> tuple[bool, Tensor | None, bool] | None:
    """Whether a row is changed, the output, and whether every row has a key that is moved; None
    where biases and vectors need more.

    Which rows see a changed key need not be known here: the operator's output keeps its bits where
    the sum of the biases is 0 and the query is the model's own.
    """
    bias, call = edit.biases, edit.call
    if edit.extras or edit.key is not call.key or edit.value is not call.value:
        return None
    asked = edit.query is not call.query
    some = asked and bool(edit.touched.any())
    weight: Tensor | None = None
    every = False
    if bias is not None:
        if not isinstance(bias, KeyBias) or bias.requires_grad:
            return None
        weight = bias.weight
        if weight.device != call.query.device:
            return None
        moved = weight != 0
        if call.padded:
            moved = moved & (call.key_positions >= 0)[:, None]
        moved_rows = moved.any(-1)
        if bool(moved_rows.any()):
            some, every = True, not asked and bool(moved_rows.all())
            if call.padded and _see(call.query_positions < 0, moved, call):
                return None
    if not some:
        return False, None, False
    if asked and call.padded and bool((edit.touched & _padding(call)).any()):
        return None
    output = shifted(call, weight, edit.query, every=every)
    return None if output is None else (True, output, every)


def _padding(call: Call) -> Tensor:
    return (call.query_positions < 0)[:, None]


def _see(padding: Tensor, moved: Tensor, call: Call) -> bool:
    """Whether queries of padding, which stay plain, may see a key that is moved."""
    if not bool(padding.any()):
        return False
    causal, _, _ = split_bias(call.bias)
    square = padding.shape[1] == moved.shape[-1] > 1
    if causal is None or causal.offset != 0 or not square:
        return True
    order = torch.arange(1, padding.shape[1] + 1, device=padding.device)
    last = torch.where(padding, order, 0).amax(-1)
    first = torch.where(moved.any(1), order, len(order) + 1).amin(-1)
    return bool((first <= last).any())
