"""What a sequence of forwards was fed, so that a branch can be fed the same."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import Refused
from attnbias.hub.request import MaskRequest

if TYPE_CHECKING:
    from attnbias.steer.branch import Lane

# Inputs of the shape of the tokens that go along with them.
KINDS = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
# Inputs that images and videos bring along.
MEDIA = re.compile("pixel|image_|video|grid_thw|mm_encoder|second_per_grid")
# Inputs that say how a forward answers, or belong to the main sequence alone.
_OWN = (
    *("input_ids", "inputs_embeds", "decoder_input_ids", "attention_mask", "position_ids"),
    *("past_key_values", "use_cache", "cache_position", "labels", "return_dict"),
    *("output_attentions", "output_hidden_states", "logits_to_keep", "num_logits_to_keep"),
)


@dataclass
class Chunk:
    """One forward's tokens: ids or embeddings, their kinds, and what else came with them."""

    ids: Tensor | None
    embeds: Tensor | None
    kinds: dict[str, Tensor]
    extras: dict[str, Any]

    @property
    def length(self) -> int:
        given = self.embeds if self.ids is None else self.ids
        return 0 if given is None else given.shape[1]


@dataclass(eq=False)
class Record:
    """One main sequence, from its prompt on.

    Attributes:
        real: ``(batch, length)``, False at padding. given: the caller's position ids ``(..., batch,
            length)``, where all forwards had them.
        version: counts forwards. steps: how many of them were decoding steps.
        past: tokens before the newest forward. lanes: the branches' own sequences.
        trouble: why this sequence cannot be followed, empty where it can.
        module: what the caller called.
    """

    chunks: list[Chunk]
    real: Tensor
    given: Tensor | None
    module: nn.Module
    past: int = 0
    version: int = 0
    steps: int = 0
    trouble: str = ""
    frozen: dict[Any, Any] = field(default_factory=dict)
    lanes: dict[Any, Lane] = field(default_factory=dict)
    cache: Any = None  # a weak reference to the main sequence's, as the newest forward returned it

    @property
    def length(self) -> int:
        return self.real.shape[1]

    @property
    def phase(self) -> str:
        return "decode" if self.steps else "prefill"

    @property
    def batch(self) -> int:
        return self.real.shape[0]

    @property
    def ids(self) -> Tensor | None:
        """Token ids ``(batch, length)``, None where the caller gave embeddings."""
        parts = [chunk.ids for chunk in self.chunks]
        return None if any(one is None for one in parts) else torch.cat(parts, 1)  # type: ignore[arg-type]

    @property
    def positions(self) -> Tensor:
        """Token positions ``(batch, length)``, -1 at padding."""
        return (self.real.long().cumsum(-1) - 1).masked_fill(~self.real, -1)

    @property
    def last(self) -> Tensor:
        """The newest forward's last real token, counted inside that forward; -1 for none."""
        new = self.real[:, self.past :]
        order = torch.arange(new.shape[1], device=new.device)
        return torch.where(new, order, -1).amax(-1)

    def moved(self, removed: Tensor) -> Tensor | None:
        """The caller's position ids in texts without some tokens, ``(batch, length)``.

        What follows a removed stretch moves to where that began, in each kind of positions: an
        image counts as far as it counted.
        """
        given = self.given
        if given is None or not bool(removed.any()):
            return given
        gap = (given[..., 1:] - given[..., :-1]) * removed[:, :-1]
        return given - torch.nn.functional.pad(gap.cumsum(-1), (1, 0))

    def inside(self, start: int) -> bool:
        """Whether a token stands inside a forward's tokens, not at their beginning."""
        place = 0
        for chunk in self.chunks:
            if place < start < place + chunk.length:
                return True
            place += chunk.length
        return False

    def cut(self, length: int) -> None:
        """Forget what came after: the caller has cropped the cache."""
        self.real = self.real[:, :length]
        self.given = None if self.given is None else self.given[..., :length]
        kept, left = [], length
        for chunk in self.chunks:
            if left > 0:
                kept.append(_part(chunk, slice(0, left)))
            left -= chunk.length
        self.chunks = kept
        for lane in self.lanes.values():
            if lane.used > length:
                lane.reset()

    def since(self, start: int, embed: Callable[[Tensor], Tensor]) -> Chunk:
        """All tokens from `start` on as one chunk."""
        parts, place = [], 0
        for chunk in self.chunks:
            if place + chunk.length > start:
                parts.append(_part(chunk, slice(max(start - place, 0), None)))
            place += chunk.length
        extras: dict[str, Any] = {}
        for part in parts:
            for name, value in part.extras.items():
                both = isinstance(value, Tensor) and isinstance(extras.get(name), Tensor)
                media = both and bool(MEDIA.search(name))
                extras[name] = torch.cat([extras[name], value]) if media else value
        shared = [name for name in KINDS if all(name in part.kinds for part in parts)]
        kinds = {name: torch.cat([part.kinds[name] for part in parts], 1) for name in shared}
        if all(part.ids is not None for part in parts):
            return Chunk(torch.cat([_ids(part) for part in parts], 1), None, kinds, extras)
        whole = [embed(_ids(part)) if part.embeds is None else part.embeds for part in parts]
        return Chunk(None, torch.cat(whole, 1), kinds, extras)


def _ids(chunk: Chunk) -> Tensor:
    assert chunk.ids is not None
    return chunk.ids


def _part(chunk: Chunk, part: slice) -> Chunk:
    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:, part]

    kinds = {name: value[:, part] for name, value in chunk.kinds.items()}
    return Chunk(cut(chunk.ids), cut(chunk.embeds), kinds, chunk.extras)


def arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name."""
    return {**dict(zip(names_of(module), args, strict=False)), **kwargs}


def names_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward."""
    own = getattr(module.forward, "__func__", None)
    # The first is the module itself. What is no method may hold anything: it is not kept.
    found = inspect.signature(module.forward).parameters if own is None else _names(own)[1:]
    return tuple(found)


@functools.lru_cache(maxsize=64)
def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def chunk_of(given: Mapping[str, Any]) -> Chunk | None:
    """The tokens that a forward is given, None where it is given none (a vision model)."""
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    if given.get("decoder_input_ids") is not None:
        ids = given["decoder_input_ids"]
    if ids is None and embeds is None:
        return None
    tokens: Any = embeds if ids is None else ids
    shape = tokens.shape[:2]
    kinds = {
        name: value
        for name in KINDS
        if isinstance(value := given.get(name), Tensor) and value.shape[:2] == shape
    }
    extras = {
        name: value
        for name, value in given.items()
        if name not in (*_OWN, *KINDS) and value is not None
    }
    return Chunk(ids, None if ids is not None else embeds, kinds, extras)


def real_tokens(given: Mapping[str, Any], chunk: Chunk, past: int) -> Tensor:
    """Which tokens are real, from the first on: bool ``(batch, past + new)``."""
    mask = given.get("attention_mask")
    if given.get("decoder_input_ids") is not None:
        mask = given.get("decoder_attention_mask")
    if isinstance(mask, dict):  # one for each kind of layer
        mask = next(iter(mask.values()), None)
    if isinstance(mask, MaskRequest):
        mask = mask.padding
    tokens = chunk.embeds if chunk.ids is None else chunk.ids
    assert tokens is not None
    length = past + chunk.length
    if mask is None:
        return torch.ones(tokens.shape[0], length, dtype=torch.bool, device=tokens.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise Refused(
            "a rule on next-token scores needs attention_mask as (batch, length) to know which "
            "tokens are real; leave out the 4-D mask."
        )
    real = mask.to(torch.bool)
    if real.shape[1] < length:  # a mask of the new tokens alone
        known = torch.ones(real.shape[0], length - real.shape[1], dtype=torch.bool)
        real = torch.cat([known.to(real.device), real], 1)
    return real[:, :length]
