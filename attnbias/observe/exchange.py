"""Attention with queries and keys exchanged: what a key gets from all queries, without a tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnbias.bias import Bias, Dense, KeyBias, Padding, Segments, Window
from attnbias.lowering.strided import reverse

if TYPE_CHECKING:
    from attnbias.observe.scene import Scene


def exchanged(
    scene: Scene, query: Tensor, key: Tensor, weight: Tensor, masks: list[Bias]
) -> Tensor:
    """(B, H, M): ``log sum_i exp(score_ij + mask_ij + weight_i)`` with weight (B, H, N).

    One call with the keys as queries, the queries as keys, and the weight as key bias. Keys that no
    query can reach (unwritten slots of a static cache) are cut off first.
    """
    found = query.new_full((*query.shape[:2], key.shape[2]), -torch.inf)
    low, high = scene.span(slice(0, scene.queries))
    if high > low:
        masks = [t[..., slice(None), low:high] for t in masks]
        found[..., low:high] = _run(scene, query, key[:, :, low:high], weight, masks)
    return found


def _run(scene: Scene, query: Tensor, key: Tensor, weight: Tensor, masks: list[Bias]) -> Tensor:
    # Structured masks are mirrored as well as exchanged, which leaves a causal mask causal.
    mirror = all(isinstance(t, (Window, Segments, Padding)) for t in masks)
    parts = [_exchanged(t, mirror) for t in masks if not isinstance(t, Padding)]
    if mirror:
        query, key, weight = reverse(query), reverse(key), weight.flip(2)
    share = query.shape[1] // key.shape[1]
    found = query.new_empty(*query.shape[:2], key.shape[2])
    for member in range(share):  # one query head of each group at a time: keys are not copied
        heads = slice(member, None, share)
        bias: Bias = KeyBias(weight[:, heads].contiguous())
        for part in parts:
            bias = bias + (part if part.heads == 1 else _every(part, heads))
        found[:, heads] = scene.attend(key, query[:, heads], query[:, heads], bias, False)[1]
    if mirror:
        found = found.flip(2)
    for term in masks:  # a key that padding hides from every query
        if isinstance(term, Padding):
            found = found.masked_fill(~term.keep[:, None].to(found.device), -torch.inf)
    return found


def _every(bias: Bias, heads: slice) -> Bias:
    """Every n-th head of a mask that differs by head; slices of a bias have step one."""
    chosen = [bias[:, h : h + 1, :, :].dense() for h in range(bias.heads)[heads]]
    return Dense(torch.cat(chosen, 1))


def _exchanged(term: Bias, mirror: bool) -> Bias:
    """A mask with queries and keys exchanged, and with `mirror` both read from the end."""
    if not mirror:
        return term.transpose()
    if isinstance(term, Segments):
        return Segments(term.key_ids.flip(-1), term.query_ids.flip(-1))
    assert isinstance(term, Window)
    assert term.queries is not None
    assert term.keys is not None
    return Window(
        term.before,
        term.after,
        queries=term.keys,
        keys=term.queries,
        offset=term.queries - term.keys + term.offset,
        device=term.device,
    )
