"""Hand-made attention calls, and their whole map by another route: dense, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.hub import Site


@dataclass
class FakeCall:
    """What a statistic reads of a call."""

    query: Tensor
    key: Tensor
    bias: ab.Bias | None
    query_positions: Tensor
    key_positions: Tensor
    scale: float = 0.35
    sink: Tensor | None = None
    site: Site = field(default_factory=lambda: Site("text", 0, "layer", "self"))
    past: int = 0

    @property
    def value(self) -> Tensor:
        return self.key


@dataclass(frozen=True)
class DenseMap:
    """A map laid out by absolute positions; NaN where a row has no such query or key.

    p: (B, H, Q, K) float64; visible: (B, H, Q, K) bool, by the model's own masks;
    has_key: (B, 1, K) bool.
    """

    p: Tensor
    visible: Tensor
    has_key: Tensor
    spans: dict[str, Any]

    @property
    def real(self) -> Tensor:
        """(B, H, Q): the queries that are tokens and see something."""
        return (~self.p.isnan()).any(-1)


def has_key(keys: Tensor) -> Tensor:
    """(B, 1, K): which key positions a row has, from the positions of its slots (B, M)."""
    length = keys.amax(-1, keepdim=True) + 1
    return (torch.arange(int(keys.max()) + 1) < length)[:, None]


def by_position(p: Tensor, visible: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Maps by slot (B, H, N, M) to maps by position; rows of padding and blind rows are NaN."""
    batch, heads = p.shape[:2]
    size = (int(queries.max()) + 1, int(keys.max()) + 1)
    out = torch.full((batch, heads, *size), torch.nan, dtype=torch.float64)
    seen = torch.zeros(batch, heads, *size, dtype=torch.bool)
    visible = visible.expand(batch, heads, *p.shape[2:])
    for b in range(batch):
        columns = [s for s in range(p.shape[3]) if keys[b, s] >= 0]
        at = keys[b, columns]
        for i in range(p.shape[2]):
            if queries[b, i] < 0:
                continue
            for h in range(heads):
                if visible[b, h, i, columns].any():
                    out[b, h, queries[b, i], at] = p[b, h, i, columns].double()
                    seen[b, h, queries[b, i], at] = visible[b, h, i, columns]
    return out, seen


def dense_of(call: FakeCall, extra: ab.Bias | None = None, spans: Any = None) -> DenseMap:
    """The map of a hand-made call in float64."""
    share = call.query.shape[1] // call.key.shape[1]
    key = call.key.double().repeat_interleave(share, 1)
    scores = call.scale * call.query.double() @ key.mT
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if call.bias is not None:
        scores = scores + call.bias.dense().double()
        hidden = call.bias.dense().double()
    if extra is not None:
        scores = scores + extra.dense().double()
    lse = scores.logsumexp(-1)
    if call.sink is not None:
        lse = torch.logaddexp(lse, call.sink.double()[None, :, None])
    p = torch.exp(scores - lse[..., None]).nan_to_num(0.0)
    batch = call.query.shape[0]
    own = (hidden > -torch.inf).expand(batch, -1, *scores.shape[2:])
    # Blind rows are those that the whole sum hides: an edit may hide keys too.
    blind = ~(scores > -torch.inf).any(-1, keepdim=True)
    p = p.masked_fill(blind, torch.nan)
    queries = call.query_positions.expand(batch, -1)
    keys = call.key_positions.expand(batch, -1)
    laid, seen = by_position(p, own, queries, keys)
    return DenseMap(laid, seen, has_key(keys), spans or {})


def random_call(
    *,
    seed: int = 0,
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    queries: int = 40,
    keys: int | None = None,
    size: int = 8,
    sharp: float = 1.0,
    masks: str = "causal",
    padding: str | None = None,
    sink: bool = False,
    dtype: torch.dtype = torch.float32,
) -> FakeCall:
    """A call with a quarter of its heads sharp, and the masks named."""
    gen = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    query = torch.randn(batch, heads, queries, size, generator=gen)
    query[:, : max(heads // 4, 1)] *= 4 * sharp
    key = torch.randn(batch, groups, keys, size, generator=gen) + 1.5  # keys are never centred
    keep = torch.ones(batch, keys, dtype=torch.bool)
    if padding == "left":
        for row in range(batch):
            keep[row, : 3 * row] = False
    if padding == "right":
        for row in range(batch):
            keep[row, keys - 3 * row :] = False
    offset = keys - queries
    terms: list[ab.Bias] = []
    if "causal" in masks:
        terms.append(ab.Causal(queries, keys))
    if "window" in masks:
        terms.append(ab.Window(6, 0, queries=queries, keys=keys))
    if "both" in masks:
        terms.append(ab.Window(5, 4, queries=queries, keys=keys))
    if "packed" in masks:
        ids = torch.arange(keys) // 11
        terms.append(ab.Segments(ids[offset:], ids))
    if "function" in masks:
        terms.append(
            ab.MaskFunction(
                # Not symmetric: exchanging queries and keys must show.
                lambda b, h, q, k: (q + 2 * k) % 5 != 0,
                queries=queries,
                keys=keys,
                query_start=offset,
            )
        )
    if "relative" in masks:
        table = torch.randn(heads, queries + keys - 1, generator=gen)
        terms.append(ab.Relative(table, queries=queries, keys=keys))
    if padding:
        terms.append(ab.Padding(keep))
    key_positions = (keep.cumsum(-1) - 1).masked_fill(~keep, -1)
    bias = None
    for term in terms:
        bias = term if bias is None else bias + term
    return FakeCall(
        query=query.to(dtype),
        key=key.to(dtype),
        bias=bias,
        query_positions=key_positions[:, offset:],
        key_positions=key_positions,
        sink=torch.randn(heads, generator=gen) + 1 if sink else None,
        past=0,  # the first call of its run, wherever its queries stand
    )
