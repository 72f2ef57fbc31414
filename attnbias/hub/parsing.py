"""Recognising the mask functions of transformers, as structures.

Transformers composes masks from a handful of closures. Each is recognised by the name of the
function that made it and read through its closure; a rule that is not known is never guessed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from attnbias.bias import Bias, Causal, Padding, Segments, Window, add

Rule = Callable[..., Any]
MASKING_MODULE = "transformers.masking_utils"


class Geometry(Protocol):
    """The part of a mask request that a structure depends on."""

    batch: int
    queries: int
    keys: int

    @property
    def query_start(self) -> int: ...

    @property
    def key_start(self) -> int: ...

    @property
    def device(self) -> torch.device: ...


def is_causal(term: Bias) -> bool:
    return isinstance(term, Window) and term.after is not None and term.after <= 0


def simple(term: Bias) -> Bias | None:
    """A causal mask or window without the sides that hide nothing at these lengths."""
    if not isinstance(term, Window):
        return term
    assert term.queries is not None
    assert term.keys is not None
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


def parse(rule: Rule, request: Geometry) -> list[Bias] | None:
    """The structures whose sum is `rule` over the slots of `request`; None if not known."""
    if getattr(rule, "__module__", None) != MASKING_MODULE or not hasattr(rule, "__code__"):
        return None
    name = rule.__qualname__.split(".")[0]
    reader = _READERS.get(name)
    return None if reader is None else reader(_closure(rule), request)


def _sizes(request: Geometry) -> dict[str, Any]:
    return {
        "queries": request.queries,
        "keys": request.keys,
        "offset": request.query_start - request.key_start,
        "device": request.device,
    }


def _causal(_: dict[str, Any], request: Geometry) -> list[Bias] | None:
    return [Causal(**_sizes(request))]


def _bidirectional(_: dict[str, Any], request: Geometry) -> list[Bias] | None:
    return []


def _sliding(closure: dict[str, Any], request: Geometry) -> list[Bias] | None:
    return [Window(int(closure["sliding_window"]) - 1, None, **_sizes(request))]


def _sliding_both(closure: dict[str, Any], request: Geometry) -> list[Bias] | None:
    width = int(closure["sliding_window"])
    return [Window(width, width, **_sizes(request))]


def _chunked(closure: dict[str, Any], request: Geometry) -> list[Bias] | None:
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


def _padding(closure: dict[str, Any], request: Geometry) -> list[Bias] | None:
    keep = closure["padding_mask"].to(torch.bool)
    stop = request.key_start + request.keys
    if keep.ndim != 2 or keep.shape[-1] < stop:
        return None
    return [Padding(keep[:, request.key_start : stop])]


def _packed(closure: dict[str, Any], request: Geometry) -> list[Bias] | None:
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


def _all_of(closure: dict[str, Any], request: Geometry) -> list[Bias] | None:
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


def _any_of(closure: dict[str, Any], request: Geometry) -> list[Bias] | None:
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


_READERS: dict[str, Callable[[dict[str, Any], Geometry], list[Bias] | None]] = {
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
