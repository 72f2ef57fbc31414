"""States of a decoding with their caches: copied, cut, repeated, without touching what was."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from attnbias.hub import Site

CACHE = "past_key_values"
# Inputs with one column for each token of the prompt.
_LONG = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class State:
    """Where a decoding stands; a forward uses up its cache, so keep a `copied` one.

    Attributes:
        ids: ``(rows, length)``, all tokens. inputs: for the model, with the cache.
        logits: of the coming token ``(rows, vocabulary)``, float32; None where the last token has
            not been run.
        looked: what `look` returned in that forward.
    """

    ids: Tensor
    inputs: dict[str, Any]
    logits: Tensor | None
    looked: dict[Site, Any]

    @property
    def cache(self) -> Any:
        return self.inputs.get(CACHE)

    @property
    def past(self) -> int:
        """Tokens in the cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def extended(self, tokens: Tensor) -> State:
        """One more token ``(rows,)``, not run."""
        return State(torch.cat([self.ids, tokens[:, None]], 1), self.inputs, None, {})

    def shortened(self) -> State:
        """A prompt without its last token."""
        return State(self.ids[:, :-1], _shorter(self.inputs, self.ids.shape[1]), None, {})


def _shorter(inputs: dict[str, Any], length: int) -> dict[str, Any]:
    """Inputs for `length` tokens, without the last."""
    found = dict(inputs)
    for name in _LONG:
        value = inputs.get(name)
        if isinstance(value, Tensor) and value.shape[-1] == length:
            found[name] = value[..., :-1]
        elif isinstance(value, Tensor) and name == "position_ids" and value.shape[-1] == 1:
            found[name] = value - 1  # before 5.3 or so: that of the coming token alone
    return found


def light(state: State) -> bool:
    """Whether the cache grows by new tensors, so that holding the old ones is a copy."""
    return all(type(layer).__name__ in _GROWING for layer in _layers(state.cache))


_GROWING = ("DynamicLayer", "DynamicSlidingWindowLayer")


def _layers(cache: Any) -> list[Any]:
    found = getattr(cache, "layers", None)
    return found if isinstance(found, list) else [cache]


def copied(state: State) -> State:
    """The same with a cache of its own."""
    return replace(state, inputs={**state.inputs, CACHE: _copied(state)})


def _copied(state: State) -> Any:
    if not light(state):
        return copy.deepcopy(state.cache)
    cache = copy.copy(state.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache


def cropped(state: State) -> State | None:
    """A state as it was before its last token was run; None where the cache cannot tell."""
    cache = _copied(state)
    for layer in _layers(cache):
        kind = type(layer).__name__
        if kind not in _GROWING:
            return None
        if kind == "DynamicSlidingWindowLayer":
            if layer.cumulative_length >= layer.sliding_window:
                return None
            layer.cumulative_length -= 1
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys[..., :-1, :], layer.values[..., :-1, :]
    inputs = {**_shorter(state.inputs, state.ids.shape[1] + 1), CACHE: cache}
    if "cache_position" in state.inputs:  # before 5.1 or so
        inputs["cache_position"] = state.inputs["cache_position"][-1:] - 1
    return State(state.ids, inputs, None, {})


def detached(state: State) -> State:
    """The same outside of any graph, with a cache of its own."""
    found = copied(state)
    for layer in _layers(found.cache):
        for name, value in vars(layer).items():
            if isinstance(value, Tensor) and value.requires_grad:
                setattr(layer, name, value.detach())
    logits = None if found.logits is None else found.logits.detach()
    return replace(found, logits=logits)


def repeated(state: State, count: int) -> State:
    """One row as `count` equal rows; the state's cache is used up."""
    if count == 1:
        return state
    inputs = {name: _repeat(value, count, name) for name, value in state.inputs.items()}
    inputs[CACHE].batch_repeat_interleave(count)
    logits = None if state.logits is None else state.logits.repeat_interleave(count, 0)
    return State(state.ids.repeat_interleave(count, 0), inputs, logits, state.looked)


def selected(state: State, one: State, row: int) -> State:
    """One of the rows that `repeated` made of `one`, with a cache of its own."""
    found = copied(state)
    if state.ids.shape[0] == 1:
        return found
    inputs = dict(found.inputs)
    index = torch.tensor([row], device=state.ids.device)
    inputs[CACHE].batch_select_indices(index)
    for name, value in one.inputs.items():
        axis = _axis(value, name)
        if name != CACHE and axis is None and name != "cache_position":
            inputs[name] = value
        elif axis is not None:
            inputs[name] = inputs[name].index_select(axis, index.to(inputs[name].device))
    logits = None if state.logits is None else state.logits[row : row + 1]
    return State(state.ids[row : row + 1], inputs, logits, {})


def _axis(value: Any, name: str) -> int | None:
    """The axis of the rows of an input of one row, None where it has none."""
    if not isinstance(value, Tensor) or value.ndim < 2:
        return None
    axis = 1 if name == "position_ids" and value.ndim == 3 else 0
    return axis if value.shape[axis] == 1 else None


def _repeat(value: Any, count: int, name: str) -> Any:
    axis = _axis(value, name)
    return value if axis is None else value.repeat_interleave(count, axis)
