"""Probe sequences of random tokens, and attention to chosen keys while a model reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.sites import sites, unwrap

First = int | Literal["model"] | None


@dataclass(frozen=True)
class Drawer:
    """Draws lists of different tokens for a model.

    Attributes:
        allowed: token numbers that may be drawn. first: the token put before a list, None for none.
    """

    allowed: Tensor
    first: int | None
    device: torch.device

    def lists(self, count: int, length: int, seed: int) -> Tensor:
        """``(count, length)``: each row different tokens in random order."""
        if length > len(self.allowed):
            raise AttnbiasError(
                f"a list of {length} different tokens needs as many, and {len(self.allowed)} may "
                "be drawn; give a shorter length or more tokens."
            )
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randperm(len(self.allowed), generator=generator) for _ in range(count)]
        return torch.stack([self.allowed[order[:length]] for order in drawn])

    def begun(self, rows: Tensor) -> Tensor:
        """The rows after the first token, on the model's device."""
        if self.first is not None:
            rows = torch.cat([rows.new_full((len(rows), 1), self.first), rows], 1)
        return rows.to(self.device)

    @property
    def start(self) -> int:
        """The position of the first token of a list."""
        return int(self.first is not None)


def drawer(
    model: nn.Module, tokens: Sequence[int] | None, first: First, longest: int, name: str
) -> Drawer:
    """What lists for a model are drawn from.

    Args:
        tokens: token numbers; None: all but the first and the last tenth of the vocabulary, where
            tokenizers have special tokens and the commonest words, and the rarest.
        first: "model": the one that the model's config begins texts with, where it has one.
        longest: tokens of the longest probe.

    Raises:
        AttnbiasError: token numbers outside of the vocabulary, a probe longer than the model reads.
    """
    root: Any = unwrap(model)
    table = getattr(root, "get_input_embeddings", lambda: None)()
    if table is None or not isinstance(getattr(table, "weight", None), Tensor):
        raise Refused(f"{name} draws tokens, and {type(root).__name__} has no token embeddings.")
    config = root.config.get_text_config() if hasattr(root, "config") else None
    size = int(getattr(config, "vocab_size", 0) or len(table.weight))
    allowed = torch.arange(size // 10, size - size // 10)
    if tokens is not None:
        allowed = torch.as_tensor(list(tokens), dtype=torch.long)
        if len(allowed) == 0 or int(allowed.min()) < 0 or int(allowed.max()) >= size:
            raise AttnbiasError(
                f"{name}: tokens must be numbers from 0 to {size - 1}, got {tokens!r}."
            )
    if first == "model":
        given = getattr(config, "bos_token_id", None)
        first = given if isinstance(given, int) and 0 <= given < size else None
    if first is not None and (isinstance(first, bool) or not 0 <= first < size):
        raise AttnbiasError(f"{name}: first must be 'model', None or below {size}, got {first!r}.")
    allowed = torch.unique(allowed if first is None else allowed[allowed != first])
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < longest:
        raise AttnbiasError(
            f"{name}: the probe has {longest} tokens and the model reads {most}; give a smaller "
            "length or fewer repeats."
        )
    return Drawer(allowed, first, table.weight.device)


def text_tower(model: nn.Module, name: str) -> str:
    """The tower of a decoder or a text encoder.

    Raises:
        Refused: a model whose text goes through several towers, or that reads none.
    """
    towers = list(dict.fromkeys(site.tower for site in sites(model)))
    if "text" not in towers:
        raise Refused(
            f"{name} needs a model with one tower of text, and this one has "
            f"{', '.join(towers) or 'none that is known'}."
        )
    return "text"


def attention_at(
    model: nn.Module, ids: Tensor, targets: dict[str, Tensor], tower: str
) -> tuple[list[int], dict[str, Tensor], Any]:
    """Attention to chosen keys: the layers, ``(batch, layers, heads, queries, T)`` by name, output.

    NaN where no key is named; float64, on the CPU.
    """
    from attnbias.observe import observe, statistics

    looks = [statistics.At(name, count=at.shape[-1]) for name, at in targets.items()]
    numbers = [site.layer for site in sites(model) if site.tower == tower]
    layers = {tower: numbers}
    with torch.no_grad(), observe(model, looks, targets=targets, layers=layers) as seen:
        out = model(input_ids=ids)
    found = {}
    for look in looks:
        shown = seen.tensor(look.label, tower)
        found[look.target] = shown.values[0].movedim(0, 1)
    return list(shown.labels["layer"]), found, out


def next_losses(logits: Tensor, ids: Tensor, real: Tensor | None = None) -> Tensor:
    """``(rows, tokens)`` float64: ``-ln p`` of each token given those before it (nats).

    By position among the real tokens of the row: entry 0 and what lies after the end are NaN.
    """
    found = torch.full(ids.shape, torch.nan, dtype=torch.float64)
    for row in range(len(ids)):
        keep = slice(None) if real is None else real[row].bool()
        tokens, own = ids[row][keep], logits[row][keep].double()
        each = nn.functional.cross_entropy(own[:-1], tokens[1:], reduction="none")
        found[row, 1 : len(tokens)] = each.cpu()
    return found
