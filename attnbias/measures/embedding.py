"""One vector for each text from a model that encodes, with what its tokens were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.sites import unwrap

Pooling = Literal["mean", "first", "last"]
POOLINGS = ("mean", "first", "last")


def check_pooling(pooling: str) -> None:
    if pooling not in POOLINGS:
        raise AttnbiasError(f"pooling must be one of {', '.join(POOLINGS)}, got {pooling!r}.")


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def tokens(tokenizer: Any, texts: Sequence[str], limit: int | None, device: Any) -> dict[str, Any]:
    """A padded batch of texts, cut to `limit` tokens."""
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    given = tokenizer(list(texts), padding=True, return_tensors="pt", **cut)
    return {name: value.to(device) for name, value in given.items()}


def last_states(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """``(batch, tokens, size)``: the states that a model ends in, before any head for words."""
    head = getattr(unwrap(model), "get_output_embeddings", lambda: None)()
    asks = {} if head is None else {"output_hidden_states": True}
    found = model(**inputs, **asks)
    states: Tensor | None = getattr(found, "last_hidden_state", None)
    return found.hidden_states[-1] if states is None else states


def pooled(states: Tensor, mask: Tensor, pooling: Pooling) -> Tensor:
    """``(batch, size)``, of length 1: the mean of the real tokens, the first or the last."""
    real = mask.bool()
    if pooling == "mean":
        weight = real[..., None].to(states)
        found = (states * weight).sum(1) / weight.sum(1).clamp_min(1)
    else:
        order = torch.arange(real.shape[1], device=real.device)
        if pooling == "first":
            place = real.long().argmax(1)
        else:
            place = torch.where(real, order, -1).amax(1).clamp_min(0)
        found = states[torch.arange(len(states), device=states.device), place]
    return nn.functional.normalize(found, dim=-1)
