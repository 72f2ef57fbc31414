"""StreamingLLM: each token sees a few first tokens and a window of recent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnbias.bias import Bias, Bucketed, MaskFunction, add
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.rule import Rule, is_number
from attnbias.steer.site import SiteCall


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Rule):
    r"""Hide every key but the first `sinks` and the last `recent`: attention of a rolling cache.

    .. math:: j \text{ is seen by } i \iff j < s \ \text{ or }\ i - j \le r

    With ``positions="cache"`` a token's position is its place in the rolling cache, as published:
    the window keeps its distances, and a query further on than ``s + r`` sees the sinks from
    position ``s + r``:

    .. math:: p(i) = \min(i, s + r), \qquad
              B_{ij} = \mathrm{scale}\,\bigl(R_{p(i) - i}\, q_i - q_i\bigr) \cdot k_j \quad (j < s)

    where R rotates as the model's rotary embedding does.

    Args:
        sinks: s, how many first tokens stay; 4 as published.
        recent: r, how many tokens before the query stay; 2000 as in the released demonstration.
        positions: ``"cache"`` (as published; the model must have a rotary embedding of fixed
            frequencies) or ``"text"`` (only hides keys).
        heads, layers, towers, phase: see `Rule`; as published all of them.

    The pattern is that of decoding token by token with the released cache, also within one prefill
    (the released demonstration reads each prompt in one pass that sees all of itself). The cache of
    the model is not made smaller: what is hidden is still stored. A model whose own window hides
    the first tokens cannot show them again.

    Cost: one attention call on the chosen heads; memory O(queries x sinks).

    Raises:
        AttnbiasError: sinks or recent that are no whole numbers.
        Refused: cross-attention; ``positions="cache"`` without a rotary embedding, with one whose
            frequencies change with the length, or with positions on several axes.

    Source: Efficient Streaming Language Models with Attention Sinks, 2023 (arXiv 2309.17453);
    authors' code read (after each step the first 4 and the last `recent` tokens are kept, so a
    query sees `recent` tokens before itself).
    """

    sinks: int = 4
    recent: int = 2000
    positions: Literal["cache", "text"] = "cache"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sinks", "recent"):
            if not is_number(getattr(self, name)):
                raise AttnbiasError(
                    f"{name} must be a whole number from 0, got {getattr(self, name)!r}."
                )
        if self.positions not in ("cache", "text"):
            raise AttnbiasError(f"positions must be 'cache' or 'text', got {self.positions!r}.")

    def bias(self, site: SiteCall) -> Bias | None:
        if site.site.kind == "cross":
            raise Refused(
                f"StreamingLLM keeps a window of past tokens, and {site.site} reads another text: "
                "leave the tower out of towers."
            )
        queries, keys = site.query_positions, site.key_positions
        if int(queries.amax()) - self.recent <= self.sinks:
            return None  # nobody is far enough from a key to lose it
        sinks, recent = self.sinks, self.recent

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            row = queries[batch.clamp(max=len(queries) - 1), query]
            col = keys[batch.clamp(max=len(keys) - 1), key]
            return (col < sinks) | (row - col <= recent)

        mask = MaskFunction(
            visible,
            queries=site.shape[2],
            keys=site.shape[3],
            batch=max(len(queries), len(keys)),
            device=site.device,
        )
        return add(mask, self._moved(site)) if self.positions == "cache" and sinks else mask

    def _moved(self, site: SiteCall) -> Bias:
        """What the scores of the sinks gain by the query's place in the cache."""
        place = site.query_positions.clamp(max=self.sinks + self.recent)
        query = site.query.to(site.dtype)
        moved = site.rotated(query, place - site.query_positions.clamp(min=0)) - query
        chosen = (site.key_positions >= 0) & (site.key_positions < self.sinks)
        # Class 0 of keys: not a sink. The sinks of a row stand where its first tokens do.
        cols = torch.where(chosen, site.key_positions + 1, 0).expand(site.shape[0], -1)
        order = torch.arange(site.shape[3], device=site.device).expand_as(cols)
        where = cols.new_zeros(site.shape[0], self.sinks + 1).scatter(1, cols, order)[:, 1:]
        index = where[:, None, :, None].expand(-1, len(site.heads), -1, site.key.shape[-1])
        keys = site.key.gather(2, index).to(site.dtype)
        table = moved @ keys.mT * site.scale
        table = torch.cat([torch.zeros_like(table[..., :1]), table], -1)
        return Bucketed(table, None, cols[:, None])
