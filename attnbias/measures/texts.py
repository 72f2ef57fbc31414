"""Forwards over text: one row at a time without its padding, and the loss of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.rule import Heads, Layers

Pair = tuple[int, int]


def text_rows(forward: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of a forward as forwards of their own, without padding.

    Tensors of the shape of ``input_ids`` lose their padding; others (images) go with their row
    where their first size is that of the batch.
    """
    ids = forward.get("input_ids")
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise AttnbiasError(f"{name} needs forwards with input_ids (rows, tokens).")
    mask = forward.get("attention_mask")
    real = torch.ones_like(ids) if mask is None else mask
    found = []
    for row in range(len(ids)):
        keep, own = real[row].bool(), {}
        for word, value in forward.items():
            if not isinstance(value, Tensor) or (len(ids) == 1 and value.shape[:2] != ids.shape):
                own[word] = value
            elif value.shape[:2] == ids.shape:
                own[word] = value[row : row + 1, keep]
            elif len(value) == len(ids):
                own[word] = value[row : row + 1]
            else:
                raise AttnbiasError(
                    f"{name} cannot tell which part of {word!r}, of shape {tuple(value.shape)}, "
                    f"belongs to which of {len(ids)} rows: give forwards of one row."
                )
        own.pop("position_ids", None)  # of the padded text
        own["attention_mask"] = torch.ones_like(own["input_ids"])
        found.append(own)
    return found


def longer(forward: Mapping[str, Any], tokens: Tensor) -> dict[str, Any]:
    """A forward of one row with tokens ``(1, count)`` put after its own."""
    found = {**forward, "input_ids": torch.cat([forward["input_ids"], tokens], 1)}
    for word, fill in (("attention_mask", 1), ("token_type_ids", 0), ("mm_token_type_ids", 0)):
        if isinstance(found.get(word), Tensor):
            found[word] = torch.cat([found[word], torch.full_like(tokens, fill)], 1)
    return found


def row_losses(model: nn.Module, forward: Mapping[str, Any]) -> Tensor:
    """``(rows,)`` float64: the mean cross-entropy (nats) of each row's next tokens.

    Padding neither predicts nor is predicted. NaN for a row of less than two tokens.
    """
    given = {word: value for word, value in forward.items() if word != "labels"}
    ids = given["input_ids"]
    mask = given.get("attention_mask")
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    logits = model(**given).logits
    if logits.shape[1] != ids.shape[1]:
        raise AttnbiasError("the loss of a text needs a model with logits for every token.")
    found = []
    for row in range(len(ids)):
        tokens, own = ids[row, real[row]], logits[row, real[row]]
        if len(tokens) < 2:
            found.append(ids.new_full((), torch.nan, dtype=torch.float64))
            continue
        each = nn.functional.cross_entropy(own[:-1].float(), tokens[1:], reduction="none")
        found.append(each.double().mean())
    return torch.stack(found)


def places(
    heads: Heads, layers: Layers = "all", towers: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Where a rule acts, as keyword arguments."""
    return {"heads": heads, "layers": layers, "towers": towers}


def check_pairs(heads: Sequence[Any], name: str) -> tuple[Pair, ...]:
    """Pairs (layer, head) as tuples of whole numbers."""
    pairs = []
    for head in heads:
        good = isinstance(head, (tuple, list)) and len(head) == 2
        if not good or not all(isinstance(n, int) and n >= 0 for n in head):
            raise AttnbiasError(f"{name} must be pairs (layer, head), got {head!r}.")
        pairs.append((int(head[0]), int(head[1])))
    return tuple(pairs)
