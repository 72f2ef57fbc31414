"""The attention of one call as the statistics see it, and the ingredients that they share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.attention import attention
from attnbias.bias import Bias, KeyBias, Window
from attnbias.observe.exchange import exchanged
from attnbias.observe.features import Features
from attnbias.observe.placed import Placed

if TYPE_CHECKING:
    from attnbias.hub import Call

HIDDEN = -1e30  # not -inf: the fused operator reports a log-sum-exp of 0 for a row of -inf
PRECISION = 1e-5  # of an entropy in nats
ROUNDING = 1.0
BLOCK = 256  # rows of a bias read at a time


class Scene(Placed):
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

    The rest is in `Placed`: positions, spans and targets.
    """

    def __init__(
        self,
        call: Call,
        extra: Bias | None = None,
        lse: Tensor | None = None,
        spans: Mapping[str, Any] | None = None,
        targets: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(call, spans, targets)
        self._value = call.value
        kind = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        self.given = call.query.detach(), call.key.detach()  # in the model's own format
        self.query, self.key = (t.to(kind) for t in self.given)
        self.heads, self.width = self.query.shape[1], self.query.shape[3]
        self.groups, self.keys = self.key.shape[1], self.key.shape[2]
        self.scale = float(call.scale)
        self.sink = None if call.sink is None else call.sink.detach().to(kind)
        self.own = None if call.bias is None else call.bias.detach()
        parts = [b for b in (self.own, None if extra is None else extra.detach()) if b is not None]
        self.bias: Bias | None = sum(parts[1:], parts[0]) if parts else None
        # The normaliser handed over belongs to the plain scores, and in half precision it carries
        # the fused operator's short exponential (errors of 5e-5): those need one of their own.
        usable = lse is not None and extra is None and call.query.dtype == kind
        self._lse = self._sound(lse.detach()) if lse is not None and usable else None
        self._kept: dict[str, Tensor] = {}
        self._features: Features | None = None
        self._top = 1
        self.swept = False

    def sweep(self, wanted: set[str]) -> bool:
        """Find what statistics want (see `Statistic.swept`) in one pass over the map: a kernel on a
        GPU, compiled loops on a CPU.

        False, and nothing is done, where neither takes this call.
        """
        from attnbias.observe import on_chip, sweep

        asked = self.features.asked() if "features" in wanted else None
        found: on_chip.OnChip | sweep.Sweep
        if on_chip.fits(self):
            found = on_chip.OnChip(self, wanted, asked, self._top)
        elif sweep.fits(self):
            found = sweep.Sweep(self, wanted, asked, self._top)
        else:
            return False
        if found.columns is not None:
            self._kept["columns"] = found.columns
        if found.inner is not None:
            self._kept["inner"] = found.inner
        if found.peak is not None and found.place is not None:
            self._kept["weight"], self._kept["slot"] = found.peak, found.place
        if found.features is not None or found.gap is not None:
            self.features.take(found.features, found.gap)
        self.swept = True
        return True

    def ask_top(self, count: int) -> None:
        """Want the `count` largest weights of each row in `peak`."""
        self._top = max(self._top, count)

    @property
    def peak(self) -> tuple[Tensor, Tensor]:
        """(B, H, N, top) each: the largest weights of a row and their key slots, largest first, of
        equal ones the first key; slot -1 where no weight above 0 is left. Found by `sweep`.
        """
        return self._kept["weight"], self._kept["slot"]

    @functools.cached_property
    def value(self) -> Tensor:
        """(B, G, M, dv): the values, in the precision of `key`."""
        return self._value.detach().to(self.key)

    # What is added to the scores --------------------------------------------------------------

    def terms(self, kind: str) -> list[Bias]:
        """The terms of `bias` of one kind: "mask", "key" (a finite bias per key) or "other"."""
        found = [] if self.bias is None else self.bias.terms()
        return [t for t in found if _kind(t) == kind]

    @property
    def causal(self) -> bool:
        """Whether the masks let no query see a key to its right, in slots of the same sequence."""
        own = self.own_slot
        if own is None:
            return False
        return any(
            isinstance(t, Window) and t.after is not None and t.offset + t.after <= own
            for t in self.terms("mask")
        )

    @functools.cached_property
    def own_slot(self) -> int | None:
        """The key slot of query 0 itself; None where queries and keys are not of one sequence."""
        if self.site.kind != "self":
            return None
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
            self._lse = self._sound(self.attend(self.query, self.key, self.key, self.bias, True)[1])
        return self._lse

    def set_lse(self, lse: Tensor) -> None:
        """Keep a log-sum-exp, sink included, that something else has found on its way."""
        if self._lse is None:
            self._lse = self._sound(lse)

    @property
    def lse_known(self) -> bool:
        """Whether `lse` costs nothing any more."""
        return self._lse is not None

    @property
    def counted(self) -> Tensor:
        """(B, H, N) bool: the queries that are tokens and see at least one key."""
        return self.real[:, None, :] & (self.lse > -torch.inf)

    @functools.cached_property
    def centred(self) -> Tensor:
        """(B, G, M, d): the keys without their mean; scores are smaller, rows the same."""
        return self.key - self.key.mean(2, keepdim=True)

    @functools.cached_property
    def shift(self) -> Tensor:
        """(B, H, N): what centring the keys takes from each row's scores and log-sum-exp."""
        centre = self.key.mean(2, keepdim=True)
        dot = torch.einsum("bghnd,bgzd->bghn", self._grouped(), centre)
        return self.scale * dot.flatten(1, 2)

    @property
    def inner(self) -> Tensor:
        r"""(B, H, N): the entropy of each row, ``-sum_j p_ij ln p_ij``, from one call with v = k.

        With the keys centred (which moves a row's scores by a constant), the mean score under the
        normalised row is ``s q_i . sum_j p'_ij (k_j - c)``. Needs a bias of masks only.
        """
        if "inner" not in self._kept:
            mean, lse = self.attend(self.query, self.centred, self.centred, self.bias, False)
            products = mean.mul_(self.query)  # nobody else holds the means
            score = self.scale * products.sum(-1)
            self._kept["reach"] = self.scale * products.abs_().sum(-1)
            shown_lse = lse + self.shift
            self.set_lse(self.with_sink(shown_lse))
            row = (lse - score).clamp_min(0)
            if self.sink is not None:
                gap = self.lse - shown_lse  # 0 or more: the sink's part of the normaliser
                row = torch.exp(-gap) * (gap + row)
            self._kept["inner"] = row
        return self._kept["inner"]

    @property
    def unsure(self) -> Tensor:
        """(B, H, N) bool: rows of which the rounding of `inner` may exceed `PRECISION`.

        The entropy is a difference of two numbers of the size of ``s sum_d |q_id| |mean k_d|``; the
        rounding measured on trained and random models stays under `ROUNDING` times the square root
        of the head size times that, in units of the last place.
        """
        size = self.inner.new_tensor(ROUNDING * self.width**0.5 * torch.finfo(self.query.dtype).eps)
        return self.counted & (size * (self._kept["reach"] + 1) > PRECISION)

    @property
    def columns(self) -> Tensor:
        r"""(B, H, M): attention received by each key, ``sum_i p_ij`` over the queries counted.

        The exponential of the log-sum-exp of attention with queries and keys exchanged and key bias
        ``-lse_i``; a bias per key of the scores is a factor of its column. No tile is built.
        """
        if "columns" not in self._kept:
            weight = torch.where(self.counted, -self.lse, HIDDEN)
            received = exchanged(self, self.query, self.key, weight, self.terms("mask"))
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
            found = exchanged(self, query, key, weight, masks).exp().round()
            for term in [] if self.own is None else self.own.terms():
                if isinstance(term, KeyBias):  # a bias per key may hide keys too
                    found = found * (term.dense()[:, :, 0] > HIDDEN)
            self._kept["visible"] = found
        return self._kept["visible"]

    @property
    def features(self) -> Features:
        """Means under each row of values that statistics ask for; all of them share one call."""
        if self._features is None:
            self._features = Features(self)
        return self._features

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

    def entries(self, slots: Tensor) -> Tensor:
        r"""(B, H, N, T): ``p_ij`` at chosen key slots ``j`` of each query, `slots` (B, N, T).

        Slot -1 gives 0. Costs O(N T dim) beside the log-sum-exp; a bias is read in blocks of rows.
        """
        share = self.heads // self.groups
        found = self.query.new_zeros(self.batch, self.heads, *slots.shape[1:])
        for row in range(self.batch):
            safe = slots[row].clamp_min(0)
            for turn in range(slots.shape[-1]):
                key = self.key[row][:, safe[:, turn]]  # (G, N, d)
                key = key[:, None].expand(-1, share, -1, -1).flatten(0, 1)
                found[row, ..., turn] = self.scale * (self.query[row] * key).sum(-1)
            if self.bias is not None:
                found[row] += self._picked(self.bias, row, safe)
        p = torch.where(self.counted[..., None], torch.exp(found - self.lse[..., None]), 0.0)
        return p * (slots >= 0)[:, None]

    def _picked(self, bias: Bias, row: int, slots: Tensor) -> Tensor:
        """(H | 1, N, T): entries of a bias at (N, T) key slots."""
        part = bias[one(bias.batch, row), :, :, :]
        rows = []
        for start in range(0, self.queries, BLOCK):
            here = slice(start, min(start + BLOCK, self.queries))
            low, high = int(slots[here].min()), int(slots[here].max()) + 1
            block = part.block(here, slice(low, high))[0].to(self.query)
            at = (slots[here] - low)[None].expand(block.shape[0], -1, -1)
            rows.append(block.expand(-1, len(slots[here]), -1).gather(-1, at))
        return torch.cat(rows, 1)

    def sees(self, keys: Tensor) -> Tensor:
        """(B, H | 1, N) bool: whether each real query may see the key slot, by the model's own
        masks."""
        allowed = self._entries(self.own, keys.clamp_min(0)) > -torch.inf
        return allowed & self.real[:, None] & (keys >= 0)[:, None, None]

    def _entries(self, bias: Bias | None, slot: Tensor) -> Tensor:
        if bias is None:
            return self.query.new_zeros(self.batch, 1, self.queries)
        rows = []
        for row in range(self.batch):
            part = bias[one(bias.batch, row), :, :, :]
            at = int(slot[row])
            entry = part.block(slice(0, self.queries), slice(at, at + 1))[..., 0]
            rows.append(entry.to(self.query).expand(1, -1, self.queries))
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

    def with_sink(self, lse: Tensor) -> Tensor:
        return lse if self.sink is None else torch.logaddexp(lse, self.sink[None, :, None].to(lse))

    def _sound(self, lse: Tensor) -> Tensor:
        """A row that sees no key must say -inf, also where a sink gives it a finite normaliser."""
        lse = lse.to(self.query)
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

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Bias | None, sink: bool
    ) -> tuple[Tensor, Tensor]:
        logit = self.sink if sink else None
        out, lse = attention(
            query, key, value, bias=bias, scale=self.scale, sink=logit, return_lse=True
        )
        return out, lse


def _kind(term: Bias) -> str:
    if term.is_mask:
        return "mask"
    return "key" if isinstance(term, KeyBias) else "other"


def one(size: int, index: int) -> slice:
    return slice(0, 1) if size == 1 else slice(index, index + 1)
