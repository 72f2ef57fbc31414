"""Hidden states of a tower, laid out by token position, for measures of the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnbias.errors import Refused
from attnbias.hub.sites import sites, unwrap
from attnbias.steer.states import collect


@dataclass(frozen=True)
class Residual:
    """One forward of one tower.

    Attributes:
        tower: its name. layers: the numbers of its layers, in order.
        states: place -> ``(layers, batch, tokens, size)`` float64 by token position, NaN where a
            row has no such token.
        real: ``(batch, tokens)`` bool: the tokens that there are.
    """

    tower: str
    layers: tuple[int, ...]
    states: Mapping[str, Tensor]
    real: Tensor

    @property
    def hidden(self) -> Tensor:
        """The residual stream after each layer."""
        return self.states["layer"]


def main_tower(model: nn.Module, tower: str | None) -> str:
    """The tower that is named, else the text tower, else the first.

    Raises:
        Refused: there is no such tower.
    """
    names = list(dict.fromkeys(site.tower for site in sites(model) if site.kind != "cross"))
    if tower is None and names:
        return "text" if "text" in names else names[0]
    if tower is None or tower not in names:
        name = type(unwrap(model)).__name__
        raise Refused(f"{name} has no tower {tower!r}; it has {', '.join(names) or 'none'}.")
    return tower


def residual(
    model: nn.Module,
    inputs: Mapping[str, Any],
    tower: str | None = None,
    at: tuple[str, ...] = ("layer",),
) -> Residual:
    """Run the plain model once, in eval mode, and lay its hidden states out by position."""
    tower = main_tower(model, tower)
    found = collect(model, inputs, at=at, tower=tower)
    layers = tuple(state.site.layer for state in found if state.at == at[0])
    if len(set(layers)) < len(layers):
        raise Refused(
            f"the tower {tower!r} was run several times in one forward; give forwards that run it "
            "once (one image, one window)."
        )
    positions = found[0].positions.expand(len(found[0].hidden), -1)
    size = int(positions.amax()) + 1 if positions.numel() else 0
    real = torch.zeros(len(positions), size, dtype=torch.bool, device=positions.device)
    row, slot = (positions >= 0).nonzero(as_tuple=True)
    real[row, positions[row, slot]] = True
    states = {}
    for place in at:
        here = [state for state in found if state.at == place]
        laid = here[0].hidden.new_full(
            (len(here), *real.shape, here[0].hidden.shape[-1]), torch.nan, dtype=torch.float64
        )
        for number, state in enumerate(here):
            laid[number, row, positions[row, slot]] = state.hidden[row, slot].double()
        states[place] = laid
    return Residual(tower, layers, states, real)
