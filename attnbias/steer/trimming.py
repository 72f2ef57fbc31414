"""Texts and caches cut for a branch: some tokens left out, rows aligned to the right again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from attnbias.errors import Refused


def pick(tokens: Tensor, order: Tensor) -> Tensor:
    """Columns of ids ``(batch, length)`` or embeddings ``(batch, length, size)``, row by row."""
    index = order if tokens.ndim == 2 else order[..., None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index)


def compact(keep: Tensor, rule: str, name: str) -> tuple[Tensor, Tensor]:
    """Which columns each row keeps, right-aligned, and which of these are real."""
    counts = keep.sum(1)
    if keep.shape[1] > 1 and int(counts.min()) == 0:
        raise Refused(
            f"the branch {name!r} of {rule} leaves out every token of a row: keep some of the "
            "prompt, such as its question."
        )
    width = max(int(counts.max()), 1)
    order = keep.long().argsort(dim=1, stable=True)[:, -width:]
    return order, keep.gather(1, order)


def last(logits: Tensor, keep: Tensor) -> Tensor:
    """The scores ``(batch, vocabulary)`` at each row's last real token."""
    kind = logits.dtype if logits.dtype == torch.float64 else torch.float32
    if logits.shape[1] == 1:
        return logits[:, 0].to(kind)
    order = torch.arange(keep.shape[1], device=keep.device)
    last = torch.where(keep, order, 0).amax(-1)
    return logits[torch.arange(len(last), device=logits.device), last.to(logits.device)].to(kind)


def shortened(cache: Any, length: int) -> Any:
    """A copy of a growing cache without its last token, None where it is of another kind."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if type(cache) is not DynamicCache or cache.get_seq_length() != length:
        return None
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    other = copy.copy(cache)
    vars(other).pop("reorder_cache", None)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in other.layers:
        if not layer.is_initialized:
            return None
        layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
    return other
