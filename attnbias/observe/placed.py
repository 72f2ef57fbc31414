"""Where the queries and keys of one attention call stand: positions, spans, targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    from attnbias.hub import Call

Span = tuple[int, "int | None"]


class Placed:
    """Absolute token positions of one call, the named spans of its keys, and targets.

    Attributes:
        query_positions (B, N), key_positions (B, M): absolute token positions, -1 for padding.
        real (B, N): queries that are tokens and not padding.
        spans: name -> (B, 2) integers, start and stop (stop is the largest integer when open), or
            (B, positions) booleans.
        targets: name -> (B, positions, T): key positions for each query position, -1 for none.
    """

    def __init__(
        self, call: Call, spans: Mapping[str, Any] | None, targets: Mapping[str, Tensor] | None
    ) -> None:
        self.site = call.site
        self.batch, self.queries = call.query.shape[0], call.query.shape[2]
        self.device = call.query.device
        self.query_positions = call.query_positions.expand(self.batch, -1)
        self.key_positions = call.key_positions.expand(self.batch, -1)
        self.real = self.query_positions >= 0
        self.spans = {name: self._span(name, span) for name, span in (spans or {}).items()}
        self.targets = {name: self._rows(name, at) for name, at in (targets or {}).items()}

    def _rows(self, name: str, at: Tensor) -> Tensor:
        if at.shape[0] not in (1, self.batch):
            raise AttnbiasError(
                f"targets[{name!r}] has {at.shape[0]} rows and the batch has {self.batch}; give "
                "(positions, T) for all rows, or (batch, positions, T)."
            )
        return at.to(self.device).expand(self.batch, -1, -1)

    def _span(self, name: str, span: Any) -> Tensor:
        if isinstance(span, Tensor):
            if len(span) not in (1, self.batch):
                raise AttnbiasError(
                    f"spans[{name!r}] has {len(span)} rows and the batch has {self.batch}; give "
                    "(tokens) for all rows, or (batch, tokens)."
                )
            return span.to(self.device).expand(self.batch, -1)
        rows: Sequence[Any] = span if isinstance(span, list) else [span] * self.batch
        if len(rows) != self.batch:
            raise AttnbiasError(
                f"spans[{name!r}] has {len(rows)} rows and the batch has {self.batch}; give one "
                "(start, stop) for all rows, or a list with one for each row."
            )
        far = torch.iinfo(torch.long).max
        pairs = [(0, 0) if r is None else (r[0], far if r[1] is None else r[1]) for r in rows]
        return torch.tensor(pairs, dtype=torch.long, device=self.device)

    def in_span(self, name: str) -> Tensor:
        """(B, M) bool: the keys whose position lies in the span; padding never does."""
        span = self.spans[name]
        if span.dtype == torch.bool:
            known = (self.key_positions >= 0) & (self.key_positions < span.shape[1])
            return span.gather(1, torch.where(known, self.key_positions, 0)) & known
        start, stop = span[:, :1], span[:, 1:]
        inside = (self.key_positions >= start) & (self.key_positions < stop)
        return inside & (self.key_positions >= 0)

    def slot_of(self, position: int) -> Tensor:
        """(B,): the key slot that holds a token position, -1 where it is not among the keys."""
        here = self.key_positions == position
        slot = here.long().argmax(-1)
        return torch.where(here.any(-1), slot, -1)

    def slots(self, positions: Tensor) -> Tensor:
        """Key positions (B, ...) as the key slots that hold them, -1 where none does."""
        size = int(self.key_positions.amax()) + 1 if self.key_positions.numel() else 0
        table = positions.new_full((self.batch, max(size, 1)), -1)
        for row in range(self.batch):
            here = (self.key_positions[row] >= 0).nonzero()[:, 0]
            table[row, self.key_positions[row, here]] = here
        flat = positions.reshape(self.batch, -1)
        known = (flat >= 0) & (flat < size)
        return torch.where(known, table.gather(1, torch.where(known, flat, 0)), -1).reshape(
            positions.shape
        )

    def exists(self, positions: Tensor) -> Tensor:
        """(B, N, T) bool: whether the key position named for each query is a token of its row.

        One that a cache has dropped (it has left the window) is a token, with weight 0.
        """
        there = self.slots(positions) >= 0
        if self.site.kind == "self":
            there |= (positions >= 0) & (positions <= self.query_positions[..., None])
        return there & self.real[..., None]

    def aimed(self, name: str) -> Tensor:
        """(B, N, T): the key positions that `targets` names for each query here, -1 for none."""
        at = self.targets[name]
        if at.shape[1] == 0:
            return at.new_full((self.batch, self.queries, at.shape[2]), -1)
        known = self.real & (self.query_positions < at.shape[1])
        place = torch.where(known, self.query_positions, 0)
        chosen = at.gather(1, place[..., None].expand(-1, -1, at.shape[2]))
        return torch.where(known[..., None], chosen, -1)
