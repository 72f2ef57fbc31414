"""What our mask function returns in place of an N x N mask: the request itself.

Transformers hands the return value of a registered mask function to the attention function untouched,
so a small object can carry lengths, offsets, padding and the model's own mask function to the place
where they are needed. From it come, lazily and once per request, the stock mask (for the plain output,
bit for bit) and the same mask as a structured `Bias` (for everything of ours).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnbias.bias import Bias, Causal, MaskFunction, Padding, Segments, Window, add
from attnbias.errors import Refused

Rule = Callable[..., Any]
MASKING_MODULE = "transformers.masking_utils"


class _Materialised(Exception):
    """Raised by the sentinel rule: the stock mask function has begun to build a tensor."""


def _sentinel(*_: Any) -> Tensor:
    raise _Materialised


class MaskRequest:
    """One call of a mask function, kept instead of carried out.

    Args:
        stock: the mask function that the model would have called.
        arguments: the keyword arguments it would have been called with, in either calling form:
            `q_length` and `q_offset`, or the older `cache_position`.

    Attributes:
        shape: ``(batch, 1, queries, keys)``, what the stock mask would have had.
    """

    ndim = 4
    dtype = torch.bool

    def __init__(self, stock: Rule, arguments: dict[str, Any]) -> None:
        # Static caches pass their own running length and advance it in place: read it now or never.
        self.arguments = {
            name: value.clone()
            if name in ("q_offset", "kv_offset") and isinstance(value, Tensor)
            else value
            for name, value in arguments.items()
        }
        self._stock_function = stock
        self._cache: dict[Any, Any] = {}
        position = self.arguments.get("cache_position")
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

    def contiguous(self, *_: Any, **__: Any) -> MaskRequest:
        return self

    def to(self, *_: Any, **__: Any) -> MaskRequest:
        return self

    def dim(self) -> int:
        return 4

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    @property
    def device(self) -> torch.device:
        return torch.device(self.arguments.get("device", "cpu"))

    def __getitem__(self, index: Any) -> Any:
        """A model that cuts its mask gets a tensor, as if the request had never been."""
        whole = self.stock()
        if whole is None:
            whole = self._call(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        return whole[index]

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

    def _call(self, **changes: Any) -> Any:
        return self._stock_function(**{**self.arguments, **changes})

    def stock(self) -> Any:
        """The mask of the model's own implementation, None where it needs none. Built once."""
        if "stock" not in self._cache:
            self._cache["stock"] = None if self.skipped() else self._call()
        return self._cache["stock"]

    def skipped(self) -> bool:
        """Whether the stock mask is None, found without building it: O(keys)."""
        if "skipped" not in self._cache:
            try:
                self._cache["skipped"] = self._call(mask_function=_sentinel) is None
            except _Materialised:
                self._cache["skipped"] = False
        return bool(self._cache["skipped"])

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
        return parsed is not None and any(_is_causal(term) for term in parsed)

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
            terms = [term for term in map(_simple, parsed) if term is not None]
            # Slots after the last query are hidden by a causal mask whatever the padding says of them.
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
        """The 2-D mask over the slots 0 to `stop`, False beyond its end; None where there is none."""
        if self.padding is None:
            return None
        real = self.padding.to(torch.bool)
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
        """Token position of each key, ``(batch | 1, keys)``; -1 at padding and in unwritten slots."""
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


# Recognising the mask functions of transformers ------------------------------------------------


def _is_causal(term: Bias) -> bool:
    return isinstance(term, Window) and term.after is not None and term.after <= 0


def _simple(term: Bias) -> Bias | None:
    """A causal mask or window without the sides that hide nothing at these lengths."""
    if not isinstance(term, Window):
        return term
    assert term.queries is not None and term.keys is not None
    low, high = term.band()
    before = None if low is None or low <= 1 - term.queries else term.before
    after = None if high is None or high >= term.keys - 1 else term.after
    if before is None and after is None:
        return None
    return Window(
        before, after, queries=term.queries, keys=term.keys, offset=term.offset, device=term.device
    )


def _closure(rule: Rule) -> dict[str, Any]:
    cells = getattr(rule, "__closure__", None) or ()
    return {
        name: cell.cell_contents
        for name, cell in zip(rule.__code__.co_freevars, cells, strict=True)
    }


def parse(rule: Rule, request: MaskRequest) -> list[Bias] | None:
    """The structures whose sum is `rule` over the slots of `request`; None where it is not known."""
    if getattr(rule, "__module__", None) != MASKING_MODULE or not hasattr(rule, "__code__"):
        return None
    name = rule.__qualname__.split(".")[0]
    reader = _READERS.get(name)
    return None if reader is None else reader(_closure(rule), request)


def _sizes(request: MaskRequest) -> dict[str, Any]:
    return {
        "queries": request.queries,
        "keys": request.keys,
        "offset": request.query_start - request.key_start,
        "device": request.device,
    }


def _causal(_: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    return [Causal(**_sizes(request))]


def _bidirectional(_: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    return []


def _sliding(closure: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    return [Window(int(closure["sliding_window"]) - 1, None, **_sizes(request))]


def _sliding_both(closure: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    width = int(closure["sliding_window"])
    return [Window(width, width, **_sizes(request))]


def _chunked(closure: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    left = closure["left_padding"]
    if not isinstance(left, Tensor) or left.shape != (request.batch,):
        return None
    size = int(closure["chunk_size"])

    def chunk(start: int, length: int) -> Tensor:
        slots = torch.arange(start, start + length, device=left.device)
        return torch.div(slots[None] - left[:, None], size, rounding_mode="floor")

    return [
        Segments(
            chunk(request.query_start, request.queries), chunk(request.key_start, request.keys)
        )
    ]


def _padding(closure: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    keep = closure["padding_mask"].to(torch.bool)
    stop = request.key_start + request.keys
    if keep.ndim != 2 or keep.shape[-1] < stop:
        return None
    return [Padding(keep[:, request.key_start : stop])]


def _packed(closure: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    ids = closure["packed_sequence_mask"]
    length = max(request.query_start + request.queries, request.key_start + request.keys)
    if ids.ndim != 2 or ids.shape[-1] < length:
        return None
    return [
        Segments(
            ids[:, request.query_start : request.query_start + request.queries],
            ids[:, request.key_start : request.key_start + request.keys],
        )
    ]


def _all_of(closure: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    rules = closure["mask_functions"]
    within = _within_packed(rules)
    if within is not None:
        rules = within
    terms: list[Bias] = []
    for rule in rules:
        parsed = parse(rule, request)
        if parsed is None:
            return None
        terms += parsed
    return list(add(*terms).terms()) if terms else []


def _any_of(closure: dict[str, Any], request: MaskRequest) -> list[Bias] | None:
    rules = closure["mask_functions"]
    return parse(rules[0], request) if len(rules) == 1 else None


def _within_packed(rules: tuple[Rule, ...]) -> tuple[Rule, ...] | None:
    """Packed sequences: (same sequence) and (rule on the positions inside the sequence).

    Inside one sequence positions count up by one, so a rule that only compares positions says the
    same on slots, and the positions can be forgotten. That is checked here, not assumed.
    """
    if len(rules) != 2:
        return None
    names = [getattr(rule, "__qualname__", "").split(".")[0] for rule in rules]
    if names != ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        return None
    ids = _closure(rules[0])["packed_sequence_mask"]
    inner = _closure(rules[1])
    positions = inner["position_ids"]
    if positions.shape != ids.shape:
        return None
    same = ids[:, 1:] == ids[:, :-1]
    steady = bool(((positions.diff(dim=-1) == 1) | ~same).all()) and bool((positions >= 0).all())
    if not steady or not _compares_only(inner["mask_function"]):
        return None
    return (rules[0], inner["mask_function"])


_COMPARING = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
}


def _compares_only(rule: Rule) -> bool:
    if getattr(rule, "__module__", None) != MASKING_MODULE:
        return False
    name = rule.__qualname__.split(".")[0]
    if name == "and_masks":
        return all(_compares_only(part) for part in _closure(rule)["mask_functions"])
    return name in _COMPARING


_READERS: dict[str, Callable[[dict[str, Any], MaskRequest], list[Bias] | None]] = {
    "causal_mask_function": _causal,
    "bidirectional_mask_function": _bidirectional,
    "sliding_window_overlay": _sliding,
    "sliding_window_bidirectional_overlay": _sliding_both,
    "chunked_overlay": _chunked,
    "padding_mask_function": _padding,
    "packed_sequence_mask_function": _packed,
    "and_masks": _all_of,
    "or_masks": _any_of,
}
