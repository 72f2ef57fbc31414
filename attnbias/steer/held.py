"""Which tokens the layers of a cache hold, where some were dropped on the way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnbias.errors import Refused

_HELD = "_attnbias_held"  # on a cache: it is copied, and dies, with the keys that it describes
_CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer")


class Held:
    """The tokens whose keys one layer of a cache holds.

    Attributes:
        slots: ``(batch, keys)``, the place of each among all tokens; None: all of them are there.
    """

    def __init__(self, cache: Any, number: int | None, past: int, batch: int, what: str) -> None:
        self.cache, self.past, self.batch, self.what = cache, past, batch, what
        self.number = -1 if number is None else number
        self.table: dict[int, Tensor] = getattr(cache, _HELD, {})
        stored = getattr(cache, "layers", ())
        self.layer = stored[self.number] if 0 <= self.number < len(stored) else None
        slots = self.table.get(self.number)
        if slots is not None and self._count() == 0:
            slots = None  # the cache was emptied
        self.slots = None if slots is None else self._cut(slots)

    def _count(self) -> int:
        """Keys that the layer's cache holds now."""
        layer = self.layer
        if layer is None or not getattr(layer, "is_initialized", True) or layer.keys is None:
            return 0
        if type(layer).__name__ == "StaticLayer":
            return int(layer.get_seq_length())
        return int(layer.keys.shape[-2]) if layer.keys.numel() else 0

    def _cut(self, slots: Tensor) -> Tensor:
        """What is left where tokens were taken back (assisted decoding, rewinding)."""
        if slots.shape[0] != self.batch:
            if self.batch % slots.shape[0]:
                raise Refused(
                    f"{self.what}: the cache was filled for {slots.shape[0]} rows and the model "
                    f"runs {self.batch}."
                )
            slots = slots.repeat_interleave(self.batch // slots.shape[0], 0)
        lost, slots = slots[:, self._count() :], slots[:, : self._count()]
        if bool((lost < self.past).any()):  # as many keys went as in layers that hold more
            raise Refused(f"{self.what}: its cache was cut back to before tokens were dropped.")
        kept = (slots < self.past).sum(1)
        if int(kept.min()) == slots.shape[1]:
            return slots
        count = int(kept.min())
        if int(kept.max()) != count or type(self.layer).__name__ != "DynamicLayer":
            raise Refused(f"{self.what}: its cache was cut back to before tokens were dropped.")
        assert self.layer is not None
        self.layer.keys = self.layer.keys[..., :count, :]
        self.layer.values = self.layer.values[..., :count, :]
        return slots[:, :count]

    def join(self, rows: Tensor) -> tuple[Tensor, int]:
        """Slots of all keys that the layer will attend to, and how many the layer has room for."""
        kind = type(self.layer).__name__ if self.layer is not None else "DynamicLayer"
        if kind not in _CACHES:
            raise Refused(
                f"{self.what}: tokens cannot be dropped from a cache of {kind}; leave out "
                "past_key_values and cache_implementation."
            )
        slots = self.slots
        if slots is None:
            count = self._count()
            slots = torch.arange(self.past - count, self.past, device=rows.device)
            slots = slots.expand(rows.shape[0], -1)
        columns = torch.cat([slots.to(rows.device), rows], 1)
        if self.layer is not None and kind == "StaticLayer":
            return columns, int(self.layer.max_cache_len)
        return columns, columns.shape[1]

    def keep(self, columns: Tensor) -> None:
        """Remember what the layer's cache holds now."""
        stored = getattr(self.cache, "layers", ())
        self.layer = stored[self.number] if 0 <= self.number < len(stored) else None
        self.table[self.number] = columns[:, columns.shape[1] - self._count() :]
        setattr(self.cache, _HELD, self.table)
