"""One attention call of a model, as observers and editors see it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from attnbias.bias import Bias, Dense, add
from attnbias.errors import Refused
from attnbias.hub.masks import asks_causal, mask_terms
from attnbias.hub.request import MaskRequest
from attnbias.hub.sites import Site
from attnbias.hub.stock import Stock, plain_part, plain_rows, shared_flash

if TYPE_CHECKING:
    from attnbias.hub.adapter import Session

# Arguments that change which scores are computed, in ways that q, k, v and a bias do not show.
_OPAQUE = {
    "softcap": "caps its scores (softcap), so they are not scale * q.k + bias",
    "indices": "attends to keys that it picks by index",
    "block_indices": "attends to blocks of keys that it picks by index",
    "cache": "keeps its keys in pages (continuous batching)",
}


class Call:
    r"""One attention call at one site.

    .. math:: o_i = \sum_j \mathrm{softmax}_j(s\, q_i \cdot k_j + B_{ij})\, v_j

    with ``s`` = `scale`, ``B`` = `bias`, and one more logit `sink` per head in the softmax where
    the model has one.

    Attributes:
        site: where.
        query: ``(batch, heads, queries, dim)``, rotary embedding applied.
        key, value: ``(batch, key_heads, keys, dim)``, after the cache, not repeated for groups.
        dropout: probability of dropping a weight in this call. training: mode of the module.
        forward: number of the model's forward inside this context, from 0.
        recomputed: True in the backward of gradient checkpointing.
    """

    def __init__(
        self,
        session: Session,
        site: Site,
        module: nn.Module,
        tensors: tuple[Tensor, Tensor, Tensor],
        mask: Any,
        arguments: dict[str, Any],
        original: str,
        stock: Stock,
        forward: int,
        recomputed: bool,
    ) -> None:
        self.site, self.module = site, module
        self.query, self.key, self.value = tensors
        self.forward, self.recomputed = forward, recomputed
        self.original = original
        self.dropout = float(arguments.get("dropout") or 0.0)
        self.training = module.training
        self.stock = stock
        self._session, self._mask, self._arguments = session, mask, arguments
        self._cache: dict[str, Any] = {}

    @property
    def session(self) -> Session:
        """The session of the model that made the call."""
        return self._session

    def with_vectors(self, query: Tensor, key: Tensor, value: Tensor) -> Call:
        """The same call with other queries, keys and values."""
        other = copy.copy(self)
        other.query, other.key, other.value = query, key, value
        other._cache = {"bias": self._cache["bias"]} if "bias" in self._cache else {}
        return other

    def rotated(self, vectors: Tensor, by: Tensor) -> Tensor:
        """Queries or keys moved on by positions: see `attnbias.hub.rotary.rotate`."""
        from attnbias.hub.rotary import rotate

        return rotate(self._session.root, self.site, self.module, vectors, by)

    # The stock route -------------------------------------------------------------------------

    def stock_mask(self) -> Any:
        """The mask that the model's own implementation would have been given."""
        if not isinstance(self._mask, MaskRequest):
            return self._mask
        mask = self._mask.stock(self.original)
        if isinstance(mask, Tensor) and mask.device != self.query.device:
            mask = mask.to(self.query.device)
        return mask

    def outcome(self) -> tuple[Tensor, Any]:
        """Both results of the model's own attention function: output and weights (or None)."""
        if "plain" not in self._cache:
            self._cache["plain"] = self.stock(
                self.module, self.query, self.key, self.value, self.stock_mask(), **self._arguments
            )
        found: tuple[Tensor, Any] = self._cache["plain"]
        return found

    def plain(self) -> Tensor:
        """The stock output ``(batch, queries, heads, value_dim)``, bit for bit; computed once."""
        return self.outcome()[0]

    def plain_again(self) -> Tensor:
        """`plain`, but computed anew and forgotten where it is not there yet."""
        if "plain" in self._cache:
            return self.plain()
        tensors = (self.query, self.key, self.value)
        return self.stock(self.module, *tensors, self.stock_mask(), **self._arguments)[0]

    def plain_at(self, rows: Sequence[int]) -> Tensor:
        """`plain` at some queries, up to rounding, by the model's own function."""
        found = None if "plain" in self._cache else plain_rows(self, rows)
        return self.plain_again()[:, list(rows)] if found is None else found

    def plain_where(self, needed: Tensor, *, fresh: bool = False) -> Tensor:
        """`plain`, bit for bit where `needed` ``(batch, heads, queries)``; anything elsewhere.

        Less is computed where the operator allows it: see `stock.plain_part`. fresh: a tensor of
        the caller's own, to be written into.
        """
        found = None if "plain" in self._cache else plain_part(self, needed)
        if found is None:
            return self.plain().clone() if fresh else self.plain()
        return found

    def stock_with(self, tensors: tuple[Tensor, Tensor, Tensor], mask: Any, **more: Any) -> Tensor:
        """The model's own function on other tensors."""
        found: Tensor = self.stock(self.module, *tensors, mask, **{**self._arguments, **more})[0]
        return found

    def plain_with_lse(self) -> tuple[Tensor, Tensor | None]:
        """The stock output, and its log-sum-exp ``(batch, heads, queries)`` where that is free.

        Minus infinity in rows that see no key. None under eager, with gradients, dropout, one query
        or a mask too large to be worth it: compute it from `scale`, `bias` and `sink` then.
        """
        if "lse" not in self._cache:
            shared = None if "plain" in self._cache else shared_flash(self)
            if shared is not None:
                self._cache["plain"] = (shared[0], None)
            self._cache["lse"] = None if shared is None else shared[1]
        return self.plain(), self._cache["lse"]

    # What the model computes, described --------------------------------------------------------

    @property
    def scale(self) -> float:
        """The factor of q.k. Raises `Refused` where scores are more than that and a bias.

        Whoever computes scores reads this, so here the layer's own output is compared, once per
        context, with what the call describes (`verify.difference`).
        """
        self._require_scores()
        reason = self._session.verified(self)
        if reason:
            raise Refused(reason)
        return self.described_scale()

    def described_scale(self) -> float:
        """`scale` as the model gave it, without the check."""
        scaling = self._arguments.get("scaling")
        # As PyTorch's own default, to the last bit: dim ** -0.5 may differ.
        return float(1.0 / math.sqrt(self.query.shape[-1]) if scaling is None else scaling)

    @property
    def sink(self) -> Tensor | None:
        """One extra logit per head with no value ``(heads,)``, or None."""
        if self.original == "sdpa":
            return None  # the stock function ignores it, so the model computes without it
        for name in ("s_aux", "sinks"):
            given = self._arguments.get(name)
            if isinstance(given, Tensor):
                if given.numel() != self.query.shape[1]:
                    raise Refused(
                        f"{self.site}: {name} must hold one number per head "
                        f"({self.query.shape[1]}), got shape {tuple(given.shape)}."
                    )
                return given.reshape(-1)
        return None

    @property
    def bias(self) -> Bias | None:
        """The model's own masks and position bias, ``(queries, keys)``; None: all is visible."""
        if "bias" not in self._cache:
            self._require_scores()
            causal = self.asks_causal()
            keys = self.key.shape[2]
            terms = mask_terms(self._mask, self.query, keys, self.original, causal, self.site)
            position = self._arguments.get("position_bias")
            if position is not None:
                terms.append(Dense(position[..., : self.key.shape[2]]))
            self._cache["bias"] = add(*terms) if terms else None
        bias: Bias | None = self._cache["bias"]
        return bias

    @property
    def shared(self) -> dict[Any, Any] | None:
        """What is kept for all calls of this forward with the same mask; None without a request."""
        return self._mask.kept if isinstance(self._mask, MaskRequest) else None

    @property
    def padded(self) -> bool:
        """Whether a key or query may be padding (or no token yet), found once in a forward."""
        kept = self.shared
        if kept is None or self.site.kind == "cross":
            return True
        if "padded" not in kept:
            kept["padded"] = bool((self.key_positions < 0).any() | (self.query_positions < 0).any())
        return bool(kept["padded"])

    def argument(self, name: str) -> Any:
        """A keyword argument that the model gave its attention function, None where it did not."""
        return self._arguments.get(name)

    def opaque(self) -> str | None:
        """Why the scores are more than ``scale * q.k + bias``, None where they are not."""
        for name, what in _OPAQUE.items():
            if self._arguments.get(name) is not None:
                return f"{self.site} {what}; this layer can be neither observed nor steered."
        return None

    def _require_scores(self) -> None:
        reason = self.opaque()
        if reason is not None:
            raise Refused(reason)

    def asks_causal(self) -> bool:
        """Whether a call without a mask is causal, aligned to the start."""
        return asks_causal(self.module, self._arguments.get("is_causal"), self.original)

    # Where in the text -------------------------------------------------------------------------

    @property
    def past(self) -> int:
        """Key slots before query 0; at cross-attention, that of the decoder's own layer."""
        if self.site.kind == "cross":
            before = self._session.decoder_call
            return before.past if before is not None else 0
        if isinstance(self._mask, MaskRequest):
            return self._mask.query_start - self._mask.key_start
        queries, keys = self.query.shape[2], self.key.shape[2]
        if self._mask is None and queries > 1 and self.asks_causal():
            return 0  # sdpa without a mask is aligned to the start
        return max(keys - queries, 0)

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        """ "decode" for one query after others, else "prefill"."""
        return "decode" if self.query.shape[2] == 1 and self.past > 0 else "prefill"

    @property
    def query_positions(self) -> Tensor:
        """Token position of each query, ``(batch | 1, queries)``.

        0 at the first real token of the row, -1 at padding. Packed sequences count on through it.
        """
        queries = self.query.shape[2]
        if self.site.kind == "cross":
            before = self._session.decoder_call
            if before is not None and before.queries == queries:
                return before.query_positions
        elif isinstance(self._mask, MaskRequest):
            return self._mask.query_positions().to(self.query.device)
        start = 0 if self.site.kind == "cross" else self.past
        return torch.arange(start, start + queries, device=self.query.device)[None]

    @property
    def key_positions(self) -> Tensor:
        """The same for keys, ``(batch | 1, keys)``; -1 also where the cache is not written yet."""
        if isinstance(self._mask, MaskRequest):
            return self._mask.key_positions().to(self.query.device)
        queries, keys = self.query.shape[2], self.key.shape[2]
        found = torch.arange(keys, device=self.query.device)[None]
        if self.site.kind == "self" and self._mask is None and queries > 1 and self.asks_causal():
            found = found.masked_fill(found >= queries, -1)
        return found

    def __repr__(self) -> str:
        return (
            f"Call({self.site}, queries={self.query.shape[2]}, keys={self.key.shape[2]}, "
            f"forward={self.forward}, {self.phase})"
        )
