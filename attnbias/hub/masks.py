"""What a model gave its attention function as a mask, read as structures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnbias.bias import Bias, Causal, Dense, Padding
from attnbias.errors import Refused
from attnbias.hub.request import MaskRequest


def asks_causal(module: nn.Module, asked: Any, original: str) -> bool:
    """Whether a call without a mask is causal, aligned to the start.

    asked: the keyword argument `is_causal` of the call. original: the implementation it is for.
    """
    if original == "eager":
        return False
    return bool(getattr(module, "is_causal", True) if asked is None else asked)


def mask_terms(
    mask: Any, query: Tensor, keys: int, original: str, causal: bool, who: Any
) -> list[Bias]:
    """The terms of a bias that hide what `mask` hides.

    Args:
        mask: a request, a 4-D tensor, or None.
        query: ``(batch, heads, queries, dim)``. keys: how many keys there are.
        original: the implementation that the model would have used.
        causal: whether a call without a mask is causal, aligned to the start (`asks_causal`).
        who: what error messages name.
    """
    batch, heads, queries = query.shape[:3]
    if isinstance(mask, MaskRequest):
        if (mask.queries, mask.keys) != (queries, keys):
            raise Refused(
                f"{who}: the mask was asked for {mask.queries} x {mask.keys} positions, "
                f"but the layer attends from {queries} to {keys}."
            )
        if not mask.skipped(original):
            bias = mask.bias()
            return [] if bias is None else [bias]
        mask = None
    if mask is None:
        # No mask: eager sees everything, sdpa follows `is_causal`, aligned to the start.
        if queries == 1 or not causal:
            return []
        return [Causal(queries, keys, offset=0, device=query.device)]
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return [_tensor(mask, (batch, heads, queries, keys), who)]
    got = f"{mask.ndim}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
    raise Refused(f"{who}: an attention mask must have 4 dimensions, got a {got}.")


def _tensor(mask: Tensor, wanted: tuple[int, int, int, int], who: Any) -> Bias:
    if any(have not in (1, want) for have, want in zip(mask.shape, wanted, strict=True)):
        raise Refused(
            f"{who}: the 4-D attention mask has shape {tuple(mask.shape)}, expected "
            f"(batch | 1, heads | 1, queries | 1, keys | 1) of {wanted}."
        )
    if mask.dtype == torch.bool:
        return Dense(mask)
    # Transformers writes "hidden" as the lowest number of the dtype.
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if bool((hidden | (mask == 0)).all()):
        keys = mask.shape[1:3] == (1, 1) and mask.shape[3] == wanted[3]
        return Padding(~hidden[:, 0, 0]) if keys else Dense(~hidden)
    return Dense(mask.masked_fill(hidden, -torch.inf))
