"""What our mask function returns in place of an N x N mask: the request itself.

Transformers hands the return value of a registered mask function to the attention function
untouched, so a small object can carry lengths, offsets, padding and the model's own mask function
to the place where they are needed. From it come, lazily and once per request, the stock mask (for
the plain output, bit for bit) and the same mask as a structured `Bias` (for everything of ours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias, MaskFunction, Padding, add
from attnbias.errors import Refused
from attnbias.hub.parsing import Rule, is_causal, parse, simple
from attnbias.hub.standin import StandIn


class _Materialised(Exception):
    """Raised by the sentinel rule: the stock mask function has begun to build a tensor."""


def _sentinel(*_: Any) -> Tensor:
    raise _Materialised


class MaskRequest(StandIn):
    """One call of a mask function, kept instead of carried out.

    Args:
        stock: gives the mask function of an implementation ("sdpa", "eager") by name.
        arguments: the keyword arguments it would have been called with, in either calling form:
            `q_length` and `q_offset`, or the older `cache_position`.
        original: the implementation the mask was asked for, None where the config does not tell.

    Attributes:
        shape: ``(batch, 1, queries, keys)``, what the stock mask would have had.
    """

    def __init__(
        self,
        stock: Callable[[str], Rule],
        arguments: dict[str, Any],
        original: str | None = None,
    ) -> None:
        self.original = original
        # Static caches pass their own running length and advance it in place: read it now or never.
        self.arguments: dict[str, Any] = {
            name: value.clone()
            if name in ("q_offset", "kv_offset") and isinstance(value, Tensor)
            else value
            for name, value in arguments.items()
        }
        self._stock_of = stock
        self._cache: dict[Any, Any] = {}
        self.kept: dict[Any, Any] = {}  # what the calls of a forward share
        position: Tensor | None = self.arguments.get("cache_position")
        if position is not None:
            position = position.clone()
            self.arguments["cache_position"] = position
            self.queries = int(position.shape[0])
        else:
            self.queries = int(self.arguments["q_length"])
        self.keys = int(self.arguments["kv_length"])
        self.batch = int(self.arguments["batch_size"])
        self.padding: Tensor | None = self.arguments.get("attention_mask")
        self.rule: Rule = self.arguments["mask_function"]
        self.shape = torch.Size((self.batch, 1, self.queries, self.keys))

    # What models do to a mask on its way to the attention function ---------------------------

    @property
    def dtype(self) -> torch.dtype:
        given: torch.dtype = self.arguments.get("dtype") or torch.float32
        return given if self.original == "eager" else torch.bool

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        given: Any = self.arguments.get("device")
        if given is None:
            given = "cpu" if self.padding is None else self.padding.device
        return torch.device(given)

    def tensor(self) -> Tensor:
        """The mask as a tensor, for a model that computes with it: the request ends here."""
        whole = self.stock("sdpa")
        if whole is None:
            whole = self._call(
                "sdpa", allow_is_causal_skip=False, allow_is_bidirectional_skip=False
            )
        if not isinstance(whole, Tensor):
            raise Refused(f"the model computes with its mask, which is a {type(whole).__name__}.")
        return whole

    def __invert__(self) -> Tensor:
        return ~self.tensor()

    def __mul__(self, other: Any) -> Any:
        return self.tensor() * other

    def __rsub__(self, other: Any) -> Any:
        return other - self.tensor()

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return f"MaskRequest{tuple(self.shape)}"

    # Offsets ---------------------------------------------------------------------------------

    @property
    def query_start(self) -> int:
        """Slot of query 0: how many tokens (padding included) the cache held before."""
        if "query_start" not in self._cache:
            position = self.arguments.get("cache_position")
            if position is None:
                start = int(self.arguments.get("q_offset", 0))
            else:
                start = int(position[0]) if len(position) else 0
                if len(position) and int(position[-1]) - start != len(position) - 1:
                    raise Refused(
                        "cache_position must count up by one within a forward, got positions from "
                        f"{start} to {int(position[-1])} for {len(position)} tokens."
                    )
            self._cache["query_start"] = start
        return int(self._cache["query_start"])

    @property
    def key_start(self) -> int:
        """Slot of key 0: more than zero where a sliding cache has dropped its oldest keys."""
        return int(self.arguments.get("kv_offset", 0))

    # The stock mask --------------------------------------------------------------------------

    def _call(self, original: str, **changes: Any) -> Any:
        return self._stock_of(self.original or original)(**{**self.arguments, **changes})

    def stock(self, original: str) -> Any:
        """The mask of the model's own implementation, None where it needs none. Built once.

        `original` decides only where the request itself does not know the implementation.
        """
        place = ("stock", self.original or original)
        if place not in self._cache:
            self._cache[place] = self._call(original)
            self._cache["skipped", self.original or original] = self._cache[place] is None
        return self._cache[place]

    def skipped(self, original: str) -> bool:
        """Whether the stock mask is None, found without building it: O(keys)."""
        place = ("skipped", self.original or original)
        if place not in self._cache:
            try:
                made = self._call(original, mask_function=_sentinel)
                self._cache[place] = made is None
            except _Materialised:
                self._cache[place] = False
        return bool(self._cache[place])

    # The structure ---------------------------------------------------------------------------

    def bias(self) -> Bias | None:
        """The mask as a sum of structures, None where every query sees every key.

        Entry (i, j) is 0 where the stock mask shows key j to query i and minus infinity elsewhere.
        Causal masks, windows, chunks, packed sequences and padding are recognised; any other rule
        becomes a `MaskFunction`, evaluated only for the blocks that are asked for.
        """
        if "bias" not in self._cache:
            terms = self._terms()
            self._cache["bias"] = add(*terms) if terms else None
        bias: Bias | None = self._cache["bias"]
        return bias

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key, as far as the rule is recognised."""
        parsed = self._parsed()
        return parsed is not None and any(is_causal(term) for term in parsed)

    def _parsed(self) -> list[Bias] | None:
        if "parsed" not in self._cache:
            self._cache["parsed"] = parse(self.rule, self)
        parsed: list[Bias] | None = self._cache["parsed"]
        return parsed

    def _terms(self) -> list[Bias]:
        parsed = self._parsed()
        if parsed is None:
            terms: list[Bias] = [self._function()]
            reach = self.keys
        else:
            terms = [term for term in map(simple, parsed) if term is not None]
            # A causal mask hides the slots after the last query, whatever the padding says.
            reach = self.query_start + self.queries - self.key_start if self.causal else self.keys
        keep = self.keep()
        if keep is not None and not bool(keep[:, : max(reach, 0)].all()):
            terms.append(Padding(keep))
        return terms

    def _function(self) -> Bias:
        rule = self.rule

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = rule(batch, torch.zeros_like(head), query, key)
            if not isinstance(seen, Tensor) or seen.dtype != torch.bool:
                got = seen.dtype if isinstance(seen, Tensor) else type(seen).__name__
                raise Refused(f"the model's mask function must return booleans, got {got}.")
            return seen

        return MaskFunction(
            visible,
            queries=self.queries,
            keys=self.keys,
            batch=self.batch,
            query_start=self.query_start,
            key_start=self.key_start,
            device=self.device,
        )

    # Padding and positions -------------------------------------------------------------------

    def _real(self, stop: int) -> Tensor | None:
        """The 2-D mask over the slots 0 to `stop`, False beyond its end; None without one."""
        if self.padding is None:
            return None
        real = self.padding.to(torch.bool)
        if real.ndim != 2:
            raise Refused(
                "attention_mask must be (batch, length) or (batch, heads, queries, keys), got "
                f"shape {tuple(real.shape)}."
            )
        if stop > real.shape[-1]:
            real = torch.nn.functional.pad(real, (0, stop - real.shape[-1]))
        return real[:, :stop]

    def keep(self) -> Tensor | None:
        """Which keys are real: booleans ``(batch, keys)``, None where there is no 2-D mask."""
        if "keep" not in self._cache:
            real = self._real(self.key_start + self.keys)
            self._cache["keep"] = None if real is None else real[:, self.key_start :]
        keep: Tensor | None = self._cache["keep"]
        return keep

    def query_positions(self) -> Tensor:
        """Token position of each query, ``(batch | 1, queries)``; -1 at padding."""
        return self._positions("query", self.query_start, self.query_start + self.queries)

    def key_positions(self) -> Tensor:
        """Token position of each key, ``(batch | 1, keys)``; -1 at padding, in unwritten slots."""
        stop = self.key_start + self.keys
        found = self._positions("key", self.key_start, stop)
        written = self.query_start + self.queries
        if stop > written and (self.causal or self._parsed() is None):
            slots = torch.arange(self.key_start, stop, device=found.device)
            found = found.masked_fill(slots >= written, -1)
        return found

    def _positions(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self._cache:
            real = self._real(stop)
            if real is None:
                found = torch.arange(start, stop, device=self.device)[None]
            else:
                counted = real.cumsum(-1) - 1
                found = counted.masked_fill(~real, -1)[:, start:]
            self._cache[name] = found
        positions: Tensor = self._cache[name]
        return positions
