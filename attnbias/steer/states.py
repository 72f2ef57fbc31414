"""Hidden states of plain forwards, for rules that are fitted on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.hub.layers import PLACES
from attnbias.hub.sites import Site, sites, unwrap
from attnbias.steer.hidden import HiddenCall
from attnbias.steer.rule import Heads, Layers, Rule


@dataclass(frozen=True)
class State:
    """Hidden states of one layer in one forward.

    Attributes:
        site: the attention site of the layer. at: ``"layer"``, ``"mlp"``, ``"attention"`` or
            ``"neurons"``.
        positions: ``(batch | 1, tokens)``, -1 where there is no token.
        hidden: ``(batch, tokens, size)``, or what `keep` made of it.
    """

    site: Site
    at: str
    positions: Tensor
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class _Reader(Rule):
    """Reads at some places and changes nothing."""

    heads: Heads = "all"
    at: tuple[str, ...]
    keep: Callable[[HiddenCall, Tensor], Tensor]
    found: list[State] = field(default_factory=list)

    @property
    def places(self) -> tuple[str, ...]:
        return self.at

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        kept = self.keep(site, hidden.detach())
        self.found.append(State(site.site, site.at, site.positions, kept))
        return None


def _whole(site: HiddenCall, hidden: Tensor) -> Tensor:
    return hidden


def collect(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    at: str | tuple[str, ...] = "layer",
    layers: Layers = "all",
    tower: str | None = None,
    keep: Callable[[HiddenCall, Tensor], Tensor] = _whole,
) -> list[State]:
    """Run the plain model once and return hidden states, in the order in which they were made.

    Args:
        model: in eval mode; it is left as it is. inputs: keyword arguments of one forward.
        at: places as in `Rule.hidden`. layers: ``"all"`` or numbers.
        tower: which one, where there are several.
        keep: what to keep of each ``(batch, tokens, size)``; by default all of it.

    Raises:
        AttnbiasError: a place or layer that does not exist, a model in training mode.
        Refused: a model whose layers are not known.
    """
    from attnbias.steer.context import check_places, steer

    places = (at,) if isinstance(at, str) else tuple(at)
    if not places or not set(places) <= set(PLACES):
        raise AttnbiasError(f"at must be of {', '.join(PLACES)}, got {at!r}.")
    evaluating(model)
    towers = None if tower is None else (tower,)
    reader = _Reader(at=places, layers=layers, towers=towers, keep=keep)
    check_places(reader, sites(model))
    with torch.no_grad(), steer(model, reader):
        model(**inputs)
    return reader.found


def evaluating(model: nn.Module) -> None:
    """Raise `AttnbiasError` for a model in training mode, whose dropout would enter a fit."""
    if unwrap(model).training:
        raise AttnbiasError("fit needs a model in eval mode: write model.eval().")


def tower_of(rule: Rule, model: nn.Module, prefer: str | None = None) -> str:
    """The one tower that a rule is fitted on: the one it names, the only one, or the preferred.

    Raises:
        Refused: several towers and none is named.
    """
    names = list(dict.fromkeys(site.tower for site in sites(model) if site.kind != "cross"))
    if not names:
        raise Refused(f"{type(unwrap(model)).__name__} has no attention that is known.")
    chosen = [name for name in names if rule.towers is None or name in rule.towers]
    if len(chosen) > 1 and prefer in chosen and rule.towers is None:
        return str(prefer)
    if len(chosen) != 1:
        name = type(rule).__name__
        raise Refused(
            f"{name} is fitted on one tower and the model has {', '.join(names)}: write "
            f"{name}(towers=({names[0]!r},), ...) or the like."
        )
    return chosen[0]
