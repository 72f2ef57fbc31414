"""The loss of each row of a forward, for measures that ask how it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.sites import Site, sites, unwrap

Loss = Callable[[Any, Mapping[str, Any]], Tensor]


def row_loss(
    model: nn.Module, outputs: Any, inputs: Mapping[str, Any], loss: Loss | None
) -> Tensor:
    """``(batch,)``: the loss of every row by itself.

    `loss(outputs, inputs)` where it is given. Else, in nats: the cross-entropy of the class where
    logits are ``(batch, classes)`` (the squared error where there is one output), the mean over the
    labelled tokens (-100 is none) where they are ``(batch, tokens, vocabulary)`` and `labels` are
    given, the mean over the real next tokens where a decoder has no labels.

    Raises:
        AttnbiasError: none of these applies, or `loss` gives something else than one number a row.
    """
    rows = len(next(v for v in inputs.values() if isinstance(v, Tensor)))
    if loss is None:
        found = _own(model, outputs, inputs)
    else:
        found = loss(outputs, inputs)
    if not isinstance(found, Tensor) or found.ndim != 1 or not found.is_floating_point():
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise AttnbiasError(
            f"loss(outputs, inputs) must give one number a row ({rows},), got {got}."
        )
    return found


def _own(model: nn.Module, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    logits, labels = getattr(outputs, "logits", None), inputs.get("labels")
    name = type(unwrap(model)).__name__
    if not isinstance(logits, Tensor) or (logits.ndim == 2 and labels is None):
        raise AttnbiasError(
            f"{name}: there is no loss without logits and labels; give "
            "loss=function(outputs, inputs), one number for each row of the batch."
        )
    if logits.ndim == 2:
        assert isinstance(labels, Tensor)
        if logits.shape[1] == 1:
            return (logits[:, 0].float() - labels.reshape(-1).float()).square()
        return nn.functional.cross_entropy(logits.float(), labels.reshape(-1), reduction="none")
    shifted = _predicts_next(model)
    if labels is None:
        ids = inputs.get("input_ids")
        if not shifted or ids is None:
            raise AttnbiasError(
                f"{name}: give labels with the data, or loss=function(outputs, inputs), one number "
                "for each row of the batch."
            )
        mask = inputs.get("attention_mask")
        labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    kind = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(kind)
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == labels.shape[1] + 1:
            labels = labels.masked_fill(mask[:, :-1] == 0, -100)  # padding on the left says nothing
    each: Tensor = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    found: Tensor = each.sum(1) / (labels != -100).sum(1).clamp_min(1)
    return found


def _predicts_next(model: nn.Module) -> bool:
    """Whether the logits at a token are those of the next one."""
    root: Any = unwrap(model)
    config = getattr(root, "config", None)
    generates = getattr(root, "can_generate", lambda: False)()
    return bool(generates) and not getattr(config, "is_encoder_decoder", False)


def tower_sites(model: nn.Module, tower: str | None) -> list[Site]:
    """The attention sites of one tower: the one named, else "text", else the only one.

    Raises:
        AttnbiasError: no such tower, or several of which none is "text".
    """
    found = sites(model)
    names = list(dict.fromkeys(site.tower for site in found))
    if tower is None:
        tower = "text" if "text" in names else (names[0] if len(names) == 1 else None)
    if tower not in names:
        raise AttnbiasError(f"tower must be one of {', '.join(names)}, got {tower!r}.")
    return [site for site in found if site.tower == tower]
