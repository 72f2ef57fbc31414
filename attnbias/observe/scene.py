"""The attention of one call as the statistics see it, and the ingredients that they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.attention import attention
from attnbias.bias import Bias, Dense, KeyBias, Padding, Segments, Window
from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    from attnbias.hub import Call

HIDDEN = -1e30  # not -inf: the fused operator reports a log-sum-exp of 0 for a row of -inf
BLOCK = 1024  # queries per call where a feature has to be centred on its queries

Span = tuple[int, "int | None"]


class Scene:
    r"""One attention call: queries, keys, everything that is added to the scores, and positions.

    .. math:: p_{ij} = \exp(s\, q_i \cdot k_j + B_{ij} - \mathrm{lse}_i)

    `bias` is all that is added (the model's own masks and position bias, and the edits in force),
    `own` the model's alone. Under sink logits `lse` counts the sink, so a row of ``p`` over the
    keys shown sums to `shown` < 1, as in the model's eager map. Everything here is float32 and
    without gradient.

    Ingredients are computed when first asked for and kept; each costs at most one unbiased call:
    `lse`, `columns`, `visible`, `inner` (entropy) and the features asked for by `ask`.

    Attributes:
        query (B, H, N, d), key (B, G, M, d): as the model gave them, after rotary embedding.
        query_positions (B, N), key_positions (B, M): absolute token positions, -1 for padding.
        real (B, N): queries that are tokens and not padding.
        spans: name -> (B, 2) integers, start and stop (stop is the largest integer when open).
    """

    def __init__(
        self,
        call: Call,
        extra: Bias | None = None,
        lse: Tensor | None = None,
        spans: Mapping[str, Any] | None = None,
    ) -> None:
        self.site = call.site
        self.query, self.key = call.query.detach().float(), call.key.detach().float()
        self.batch, self.heads, self.queries, self.width = self.query.shape
        self.groups, self.keys = self.key.shape[1], self.key.shape[2]
        self.device = self.query.device
        self.scale = float(call.scale)
        self.sink = None if call.sink is None else call.sink.detach().float()
        self.own = None if call.bias is None else call.bias.detach()
        parts = [b for b in (self.own, None if extra is None else extra.detach()) if b is not None]
        self.bias: Bias | None = sum(parts[1:], parts[0]) if parts else None
        self.query_positions = call.query_positions.expand(self.batch, -1)
        self.key_positions = call.key_positions.expand(self.batch, -1)
        self.real = self.query_positions >= 0
        self.spans = {name: self._span(name, span) for name, span in (spans or {}).items()}
        # The normaliser handed over belongs to the plain scores; edited scores need their own.
        self._lse = None if lse is None or extra is not None else self._sound(lse.detach())
        self._kept: dict[str, Tensor] = {}
        self._features: dict[str, Tensor] = {}

    def _span(self, name: str, span: Any) -> Tensor:
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
        start, stop = self.spans[name][:, :1], self.spans[name][:, 1:]
        inside = (self.key_positions >= start) & (self.key_positions < stop)
        return inside & (self.key_positions >= 0)

    # What is added to the scores --------------------------------------------------------------

    def terms(self, kind: str) -> list[Bias]:
        """The terms of `bias` of one kind: "mask", "key" (a finite bias per key) or "other"."""
        found = [] if self.bias is None else self.bias.terms()
        return [t for t in found if _kind(t) == kind]

    @property
    def causal(self) -> bool:
        """Whether the masks let no query see a key to its right, in slots of the same sequence."""
        own = self._own_slot()
        if own is None or self.site.kind != "self":
            return False
        return any(
            isinstance(t, Window) and t.after is not None and t.offset + t.after <= own
            for t in self.terms("mask")
        )

    def _own_slot(self) -> int | None:
        """The key slot that holds the token of query 0's slot; None where it cannot be told."""
        real = self.real.any(0).nonzero()
        if len(real) == 0:
            return None
        column = int(real[0])
        row = int(self.real[:, column].nonzero()[0])
        place = (self.key_positions[row] == self.query_positions[row, column]).nonzero()
        return int(place[-1]) - column if len(place) else None

    # Ingredients ------------------------------------------------------------------------------

    @property
    def lse(self) -> Tensor:
        """(B, H, N): the log-sum-exp of each row, the sink included; -inf where nothing is seen."""
        if self._lse is None:
            self._lse = self._sound(
                self._attend(self.query, self.key, self.key, self.bias, True)[1]
            )
        return self._lse

    def set_lse(self, lse: Tensor) -> None:
        """Keep a log-sum-exp that a pass over the tiles has found on its way."""
        self._lse = lse

    @property
    def lse_known(self) -> bool:
        """Whether `lse` costs nothing any more."""
        return self._lse is not None

    @property
    def counted(self) -> Tensor:
        """(B, H, N) bool: the queries that are tokens and see at least one key."""
        return self.real[:, None, :] & (self.lse > -torch.inf)

    @property
    def inner(self) -> Tensor:
        r"""(B, H, N): the entropy of each row, ``-sum_j p_ij ln p_ij``, from one call with v = k.

        With the keys centred (which moves a row's scores by a constant), the mean score under the
        normalised row is ``s q_i . sum_j p'_ij (k_j - c)``. Needs a bias of masks only.
        """
        if "inner" not in self._kept:
            centre = self.key.mean(2, keepdim=True)
            centred = self.key - centre
            mean, lse = self._attend(self.query, centred, centred, self.bias, False)
            score = self.scale * (self.query * mean).sum(-1)
            dot = torch.einsum("bghnd,bgzd->bghn", self._grouped(), centre)
            shown_lse = lse + self.scale * dot.flatten(1, 2)
            if self._lse is None:
                self._lse = self._sound(self._with_sink(shown_lse))
            row = (lse - score).clamp_min(0)
            if self.sink is not None:
                gap = self._lse - shown_lse  # 0 or more: the sink's part of the normaliser
                row = torch.exp(-gap) * (gap + row)
            self._kept["inner"] = row
        return self._kept["inner"]

    @property
    def columns(self) -> Tensor:
        r"""(B, H, M): attention received by each key, ``sum_i p_ij`` over the queries counted.

        The exponential of the log-sum-exp of attention with queries and keys exchanged and key bias
        ``-lse_i``; a bias per key of the scores is a factor of its column. No tile is built.
        """
        if "columns" not in self._kept:
            weight = torch.where(self.counted, -self.lse, HIDDEN)
            received = self._transposed(self.query, self.key, weight, self.terms("mask"))
            for term in self.terms("key"):
                received = received + term.dense()[:, :, 0]
            self._kept["columns"] = torch.exp(received)
        return self._kept["columns"]

    @property
    def visible(self) -> Tensor:
        """(B, H | 1, M): how many of the real queries may see each key by the model's own masks.

        The log-sum-exp of attention with all scores zero is the logarithm of that count.
        """
        if "visible" not in self._kept:
            masks = [] if self.own is None else [t for t in self.own.terms() if t.is_mask]
            heads = max((t.heads for t in masks), default=1)
            weight = torch.where(self.real, 0.0, HIDDEN)[:, None].expand(-1, heads, -1)
            query = self.query.new_zeros(self.batch, heads, self.queries, 8)
            key = self.query.new_zeros(self.batch, heads, self.keys, 8)
            self._kept["visible"] = self._transposed(query, key, weight, masks).exp().round()
        return self._kept["visible"]

    # Features: values whose mean under each row is wanted ----------------------------------------

    def ask(self, name: str, feature: Tensor) -> None:
        """Want ``sum_j p_ij f_j`` for features (B, M, F); all that is asked for shares one call."""
        self._features[name] = feature

    def mean(self, name: str) -> Tensor:
        """(B, H, N, F): the sums of the features asked for under `name`."""
        if name not in self._kept:
            self._run_features()
        return self._kept[name]

    @property
    def lag(self) -> Tensor:
        r"""(B, H, N): ``sum_j p_ij (i - j)`` in token positions; for causal rows the mean distance.

        Positions are centred on each block of queries: the rounding grows with the distance, not
        with the position.
        """
        return self.mean("lag")

    def ask_lag(self) -> None:
        """Want `lag`; it shares its calls with the features."""
        self._features["lag"] = self.key_positions[..., None].float()

    def _run_features(self) -> None:
        names = [n for n in self._features if n not in self._kept]
        widths = [self._features[n].shape[-1] for n in names]
        step = BLOCK if "lag" in names else max(self.queries, 1)
        pieces = [
            self._features_of(names, slice(s, min(s + step, self.queries)))
            for s in range(0, self.queries, step)
        ]
        for name, part in zip(names, torch.split(torch.cat(pieces, 2), widths, -1), strict=True):
            self._kept[name] = part[..., 0] if name == "lag" else part

    def _features_of(self, names: list[str], rows: slice) -> Tensor:
        low, high = self.span(rows)
        middle = self.query_positions[:, (rows.start + rows.stop) // 2].clamp_min(0)
        packed = []
        for name in names:
            feature = self._features[name][:, low:high].float()
            packed.append(feature - middle[:, None, None] if name == "lag" else feature)
        values = torch.cat(packed, -1)
        bias = None if self.bias is None else self.bias[..., rows, low:high]
        query, key = self.query[:, :, rows], self.key[:, :, low:high]
        sums, normaliser = [], torch.empty(0)
        for part in torch.split(values, self.width, -1):
            value = torch.nn.functional.pad(part, (0, self.width - part.shape[-1]))
            value = value[:, None].expand(-1, self.groups, -1, -1)
            out, normaliser = self._attend(query, key, value, bias, False)
            sums.append(out[..., : part.shape[-1]])
        total = torch.cat(sums, -1)
        shown = torch.ones_like(normaliser)
        if self.sink is not None:  # the part of the row that the keys shown hold
            shown = torch.exp(normaliser - self._with_sink(normaliser))
            total = total * shown[..., None]
        if "lag" in names:
            place = sum(self._features[n].shape[-1] for n in names[: names.index("lag")])
            own = (self.query_positions[:, rows] - middle[:, None]).float()[:, None]
            total[..., place] = own * shown - total[..., place]
        return total

    def column(self, keys: Tensor) -> Tensor:
        """(B, H, N): ``p_ij`` of one key slot for each row of the batch, `keys` (B,); slot -1 gives
        0."""
        slot = keys.clamp_min(0)
        chosen = self.key.gather(
            2, slot[:, None, None, None].expand(-1, self.groups, 1, self.width)
        )
        score = self.scale * torch.einsum("bghnd,bgzd->bghn", self._grouped(), chosen).flatten(1, 2)
        score = score + self._entries(self.bias, slot)
        p = torch.where(self.counted, torch.exp(score - self.lse), 0.0)
        return p * (keys >= 0)[:, None, None]

    def sees(self, keys: Tensor) -> Tensor:
        """(B, H | 1, N) bool: whether each real query may see the key slot, by the model's own
        masks."""
        allowed = self._entries(self.own, keys.clamp_min(0)) > -torch.inf
        return allowed & self.real[:, None] & (keys >= 0)[:, None, None]

    def slot_of(self, position: int) -> Tensor:
        """(B,): the key slot that holds a token position, -1 where it is not among the keys."""
        here = self.key_positions == position
        slot = here.long().argmax(-1)
        return torch.where(here.any(-1), slot, -1)

    def _entries(self, bias: Bias | None, slot: Tensor) -> Tensor:
        if bias is None:
            return self.query.new_zeros(self.batch, 1, self.queries)
        rows = []
        for row in range(self.batch):
            part = bias[_one(bias.batch, row), :, :, :]
            at = int(slot[row])
            entry = part.block(slice(0, self.queries), slice(at, at + 1))[..., 0]
            rows.append(entry.float().expand(1, -1, self.queries))
        heads = max(r.shape[1] for r in rows)
        return torch.cat([r.expand(1, heads, -1) for r in rows]).to(self.device)

    # Calls ------------------------------------------------------------------------------------

    def span(self, rows: slice) -> tuple[int, int]:
        """The range of keys that these queries can see at most."""
        if self.bias is None or self.bias.keys is None:
            return (0, self.keys)
        return self.bias.span(rows)

    def _grouped(self) -> Tensor:
        share = self.heads // self.groups
        return self.query.reshape(self.batch, self.groups, share, self.queries, self.width)

    def _with_sink(self, lse: Tensor) -> Tensor:
        return lse if self.sink is None else torch.logaddexp(lse, self.sink[None, :, None].to(lse))

    def _sound(self, lse: Tensor) -> Tensor:
        """A row that sees no key must say -inf, also where a sink gives it a finite normaliser."""
        lse = lse.float()
        return lse if self.sink is None else torch.where(self._blind(), -torch.inf, lse)

    def _blind(self) -> Tensor:
        """(B, 1, N): queries from which the masks hide every key; only asked under sinks."""
        masks = [] if self.bias is None else self.terms("mask")
        if not masks:
            return torch.zeros_like(self.real)[:, None]
        zero = self.query.new_zeros(self.batch, 1, 1, 8)
        mask = sum(masks[1:], masks[0])
        heads = mask.heads
        query = zero.expand(-1, heads, self.queries, -1).contiguous()
        key = zero.expand(-1, heads, self.keys, -1).contiguous()
        return attention(query, key, key, bias=mask, scale=1.0, return_lse=True)[1] == -torch.inf

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, sink: bool
    ) -> tuple[Tensor, Tensor]:
        logit = self.sink if sink else None
        out, lse = attention(
            query, key, value, bias=bias, scale=self.scale, sink=logit, return_lse=True
        )
        return out, lse

    def _transposed(self, query: Tensor, key: Tensor, weight: Tensor, masks: list[Bias]) -> Tensor:
        """(B, H, M): log sum over queries of exp(score + mask + weight), weight (B, H, N).

        Structured masks are mirrored as well as exchanged, which leaves a causal mask causal.
        """
        found = query.new_full((*query.shape[:2], key.shape[2]), -torch.inf)
        # Keys that no query can reach (unwritten slots of a static cache) are cut off first.
        low, high = self.span(slice(0, self.queries))
        if high > low:
            masks = [t[..., slice(None), low:high] for t in masks]
            found[..., low:high] = self._exchange(query, key[:, :, low:high], weight, masks)
        return found

    def _exchange(self, query: Tensor, key: Tensor, weight: Tensor, masks: list[Bias]) -> Tensor:
        mirror = all(isinstance(t, (Window, Segments, Padding)) for t in masks)
        parts = [_exchanged(t, mirror) for t in masks if not isinstance(t, Padding)]
        if mirror:
            query, key, weight = query.flip(2), key.flip(2), weight.flip(2)
        share = query.shape[1] // key.shape[1]
        found = query.new_empty(*query.shape[:2], key.shape[2])
        for member in range(share):  # one query head of each group at a time: keys are not copied
            heads = slice(member, None, share)
            bias: Bias = KeyBias(weight[:, heads].contiguous())
            for part in parts:
                bias = bias + (part if part.heads == 1 else _heads(part, heads))
            part_query = query[:, heads]
            found[:, heads] = self._attend(key, part_query, part_query, bias, False)[1]
        if mirror:
            found = found.flip(2)
        for term in masks:
            if isinstance(term, Padding):
                found = found.masked_fill(~term.keep[:, None].to(found.device), -torch.inf)
        return found


def _kind(term: Bias) -> str:
    if term.is_mask:
        return "mask"
    return "key" if isinstance(term, KeyBias) else "other"


def _one(size: int, index: int) -> slice:
    return slice(0, 1) if size == 1 else slice(index, index + 1)


def _heads(bias: Bias, heads: slice) -> Bias:
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
