"""The other route: the eager attention of a model's own file, with its map rewritten densely.

Nothing here uses the library's hub or engine: the function `eager_attention_forward` of the model's
module is replaced, the map is computed in float64 and each edit rewrites the probabilities.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


@dataclass
class Map:
    """The attention of one call: probabilities without the sink's share, and where keys stand."""

    probabilities: Tensor  # (batch, heads, queries, keys), float64
    rest: Tensor  # (batch, heads, queries, 1): the share of the sink
    positions: Tensor  # (batch, keys): token positions, -1 where hidden from all
    decoding: bool = False
    # Scaled scores with masks and bias, minus infinity where hidden; what they are made of.
    scores: Tensor = field(default_factory=lambda: torch.empty(0))
    query: Tensor = field(default_factory=lambda: torch.empty(0))
    key: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def query_positions(self) -> Tensor:
        """``(batch, queries)``: the last keys are those of the queries (self-attention)."""
        return self.positions[:, -self.probabilities.shape[2] :]

    @property
    def last(self) -> Tensor:
        """The last real query of each row: bool ``(batch, queries)``."""
        where = self.query_positions
        return where == where.amax(-1, keepdim=True)


@dataclass
class DenseEdit:
    """A rewrite of the map at some heads of some layers."""

    rewrite: Callable[[Map], Tensor]
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None
    towers: Sequence[str] | None = None


# What an attention module calls the projection that makes its queries.
_PROJECTIONS = ("q_proj", "query", "qkv", "qkv_proj", "c_attn", "query_key_value")


def _takes_pixels(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "") == "pixel_values"


def numbering(model: nn.Module) -> dict[int, tuple[str, int]]:
    """Attention modules by id: their tower and their number inside it."""
    found: dict[int, tuple[str, int]] = {}
    counts: dict[str, int] = {}
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if not any(isinstance(getattr(module, part, None), nn.Module) for part in _PROJECTIONS):
            continue
        tower = "text"
        if "vision" in name or "visual" in name or _takes_pixels(model):
            tower = "vision"
        elif "encoder_attn" in leaf:
            tower = "cross"
        elif (
            ".decoder." in f".{name}"
            and hasattr(model, "model")
            and hasattr(model.model, "encoder")
        ):
            tower = "decoder"
        elif (
            ".encoder." in f".{name}"
            and hasattr(model, "model")
            and hasattr(model.model, "encoder")
        ):
            tower = "encoder"
        found[id(module)] = (tower, counts.get(tower, 0))
        counts[tower] = counts.get(tower, 0) + 1
    return found


@contextmanager
def rewritten(
    model: nn.Module,
    edits: Sequence[DenseEdit],
    positions: Tensor | Callable[[int], Tensor] | None = None,
    maps: list[Tensor] | None = None,
) -> Iterator[None]:
    """Run `model` (with its eager attention) under dense edits, in order.

    Args:
        positions: ``(batch, keys)`` of the keys, or a function of their number; by default read
            off the mask's last row.
        maps: every map is appended here before its edits.
    """
    numbers = numbering(model)

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        group = query.shape[1] // key.shape[1]
        q, k, v = (t.double() for t in (query, key, value))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = q @ k.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if attention_mask is not None:
            mask = attention_mask[..., : scores.shape[-1]]
            hidden = mask <= torch.finfo(mask.dtype).min / 2
            scores = (scores + mask.double().masked_fill(hidden, 0.0)).masked_fill(
                hidden, -torch.inf
            )
        sinks = getattr(module, "sinks", None)
        extra = torch.full_like(scores[..., :1], -torch.inf)
        if sinks is not None:
            extra = sinks.double().reshape(1, -1, 1, 1).expand_as(extra)
        whole = torch.cat([scores, extra], -1)
        # A padding row of the query sees nothing: any value will do, it is not looked at.
        whole = torch.where((whole == -torch.inf).all(-1, keepdim=True), 0.0, whole).softmax(-1)
        p, rest = whole[..., :-1], whole[..., -1:]
        if maps is not None:
            maps.append(p)
        where = positions(scores.shape[-1]) if callable(positions) else positions
        where = _positions(scores) if where is None else where
        tower, layer = numbers[id(module)]
        for edit in edits:
            if (edit.layers is not None and layer not in edit.layers) or (
                edit.towers is not None and tower not in edit.towers
            ):
                continue
            new = edit.rewrite(Map(p, rest, where, query.shape[2] == 1, scores, q, k))
            if edit.heads is not None:
                chosen = torch.zeros(p.shape[1], dtype=torch.bool)
                chosen[list(edit.heads)] = True
                new = torch.where(chosen[:, None, None], new, p)
            rest = torch.where(rest > 0, 1 - new.sum(-1, keepdim=True), rest)
            p = new
        return (p @ v).to(query.dtype).transpose(1, 2).contiguous(), None

    files = {type(module).__module__ for module in model.modules() if id(module) in numbers}
    with ExitStack() as stack:
        for file in files:
            stack.enter_context(
                mock.patch.object(sys.modules[file], "eager_attention_forward", forward)
            )
        yield


def _positions(scores: Tensor) -> Tensor:
    """Positions of the keys that the last query sees (no window), counted per row."""
    seen = scores[:, 0, -1] > -torch.inf
    return torch.where(seen, seen.cumsum(-1) - 1, -1)


def multiply(chosen: Callable[[Map], Tensor], factor: float) -> Callable[[Map], Tensor]:
    """Multiply the weights of chosen keys ``(batch | 1, keys)`` and normalise, sink included."""

    def rewrite(found: Map) -> Tensor:
        keys = chosen(found)[:, None, None, :]
        weights = torch.where(keys, found.probabilities * factor, found.probabilities)
        return weights / (weights.sum(-1, keepdim=True) + found.rest)

    return rewrite


def give(chosen: Callable[[Map], Tensor], share: float) -> Callable[[Map], Tensor]:
    """Give chosen keys a share of what a row's keys get; ratios inside and outside stay.

    Rows that see none of the chosen keys, or nothing else, stay as they are (below 1e-30 is none).
    """

    def rewrite(found: Map) -> Tensor:
        p = found.probabilities
        keys = chosen(found)[:, None, None, :].expand_as(p)
        inside = (p * keys).sum(-1, keepdim=True)
        outside = (p * ~keys).sum(-1, keepdim=True)
        total = inside + outside
        both = (inside > 1e-30) & (outside > 1e-30)
        inside, outside = (torch.where(both, t, 1.0) for t in (inside, outside))
        new = torch.where(keys, p * share * total / inside, p * (1 - share) * total / outside)
        return torch.where(both, new, p)

    return rewrite
