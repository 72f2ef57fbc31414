"""What the measures of vision share: which tower, and statistics row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused

if TYPE_CHECKING:
    from attnbias.observe import Seen


def tower_of(model: nn.Module, name: str, tower: str | None, prefer: str) -> str:
    """The tower to measure: the one asked for, the only one, or the preferred of several."""
    from attnbias.hub import sites

    towers = list(dict.fromkeys(site.tower for site in sites(model) if site.kind == "self"))
    if not towers:
        raise Refused(f"{type(model).__name__} has no attention that is known.")
    if tower is not None:
        if tower not in towers:
            raise AttnbiasError(
                f"{name}(tower) must be one of {', '.join(towers)} for this model, got {tower!r}."
            )
        return tower
    return towers[0] if len(towers) == 1 or prefer not in towers else prefer


def looked(
    model: nn.Module,
    inputs: Mapping[str, Any],
    statistics: list[Any],
    tower: str,
    spans: Mapping[str, Any] | None = None,
) -> Seen:
    """One forward under `observe`, of one tower alone."""
    from attnbias.hub import sites
    from attnbias.observe import observe

    layers = {tower: [site.layer for site in sites(model) if site.tower == tower]}
    with observe(model, statistics, spans=spans, layers=layers) as seen:
        model(**inputs)
    return seen


def by_sample(seen: Seen, label: str, tower: str) -> Tensor:
    """Values as ``(samples, layers, heads, ...)``: the rows of the batch, in all its calls."""
    values = seen.tensor(label, tower).values
    return values.movedim(1, 2).flatten(0, 1)


def layers_of(seen: Seen, label: str, tower: str) -> tuple[int, ...]:
    """The numbers of the layers of `by_sample`."""
    return tuple(int(n) for n in seen.tensor(label, tower).labels["layer"])


def padded(parts: list[Tensor]) -> Tensor:
    """Samples of several forwards as one tensor, NaN where a part is smaller."""
    sizes = [max(part.shape[d] for part in parts) for d in range(1, parts[0].ndim)]
    out = []
    for part in parts:
        whole = part.new_full((len(part), *sizes), torch.nan)
        whole[tuple(slice(0, n) for n in part.shape)] = part
        out.append(whole)
    return torch.cat(out)
