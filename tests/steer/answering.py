"""Another route to next-token scores: every row alone, without padding, cache or library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

NAME = "tapped"
EXTRA = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "token_type_ids")
TEXT = ("LlamaAttention", "MistralAttention", "Qwen2VLAttention", "Gemma3Attention")


class Tap:
    """What an attention function does to scores and head outputs, and what it saw, by layer.

    Args:
        scores: ``(layer, scores) -> scores``, masks included. outputs: ``(layer, outputs)``.
    """

    def __init__(
        self,
        scores: Callable[[int, Tensor], Tensor] = lambda layer, tensor: tensor,
        outputs: Callable[[int, Tensor], Tensor] = lambda layer, tensor: tensor,
    ) -> None:
        self.scores, self.outputs = scores, outputs
        self.raw: dict[int, Tensor] = {}
        self.maps: dict[int, Tensor] = {}
        self.outs: dict[int, Tensor] = {}


_TAPS: list[Tap] = []


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **given: Any,
) -> Any:
    group = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(group, 1) for t in (key, value))
    scores = query @ key.mT * given["scaling"]
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[2]]
    text = type(module).__name__ in TEXT
    tap = _TAPS[-1] if _TAPS and text else Tap()
    layer = module.layer_idx if text else 0
    tap.raw[layer] = scores
    tap.maps[layer] = tap.scores(layer, scores).softmax(-1)
    tap.outs[layer] = tap.maps[layer] @ value
    return tap.outputs(layer, tap.outs[layer]).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def tapped(model: Any, tap: Tap) -> Iterator[Tap]:
    """The model with our attention function, whose scores and outputs `tap` may change."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    _TAPS.append(tap)
    try:
        yield tap
    finally:
        _TAPS.pop()
        model.set_attn_implementation(before)


Scores = Callable[[Any, dict[str, Tensor], int], Tensor]


def last_scores(forward: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The scores after one row's last token."""
    found: Tensor = forward(**inputs, use_cache=False).logits[0, -1]
    return found


def one_row(
    inputs: dict[str, Tensor], row: int, keep: Tensor, shares: Mapping[str, int]
) -> dict[str, Tensor]:
    """One row's inputs without padding; `shares`: how many rows of an input belong to a row."""
    found, shape = {}, inputs["input_ids"].shape
    for name, value in inputs.items():
        size = shares.get(name, 1)
        found[name] = value[row * size : (row + 1) * size]
        if value.shape == shape:
            found[name] = found[name][:, keep]
    return found


def prefix(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """One row's inputs up to a token."""
    shape = inputs["input_ids"].shape
    return {n: v[:, :length] if v.shape == shape else v for n, v in inputs.items()}


@contextlib.contextmanager
def answering(
    model: Any, scores: Scores, shares: Mapping[str, int] | None = None
) -> Iterator[None]:
    """The model with other next-token scores after the last real token of each row.

    Args:
        scores: of the plain forward, one row's inputs without padding and the length of its prompt.
        shares: see `one_row`.
    """
    plain = model.forward
    prompts: dict[int, int] = {}
    cached = model.generation_config.use_cache

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **given: Any) -> Any:
        given.pop("logits_to_keep", None)
        given["use_cache"] = False
        out = plain(input_ids=input_ids, attention_mask=attention_mask, **given)
        logits = out.logits.clone()
        for row in range(len(input_ids)):
            keep = (
                torch.ones_like(input_ids[row]) if attention_mask is None else attention_mask[row]
            )
            places = keep.nonzero()[:, 0]
            tensors = {name: v for name, v in given.items() if name in EXTRA}
            inputs = one_row({"input_ids": input_ids, **tensors}, row, places, shares or {})
            prompt = prompts.setdefault(row, len(places))
            logits[row, places[-1]] = scores(plain, inputs, prompt)
        out["logits"] = logits
        return out

    model.forward = forward
    model.generation_config.use_cache = False
    try:
        yield
    finally:
        del model.forward
        model.generation_config.use_cache = cached


def without(
    inputs: dict[str, Tensor], span: tuple[int, int], image: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """One row's inputs without the tokens of a span, and without images where it is theirs."""
    shape = inputs["input_ids"].shape
    found = {
        name: torch.cat([value[:, : span[0]], value[:, span[1] :]], 1)
        for name, value in inputs.items()
        if value.shape == shape
    }
    kept = {} if span == image else {n: v for n, v in inputs.items() if n not in found}
    return {**kept, **found}
