"""How much attention chosen tokens get, with gradients: for losses on attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.context import steer
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall

if TYPE_CHECKING:
    from attnbias.hub import Site


@dataclass(frozen=True, kw_only=True)
class _Masses(Rule):
    heads: Heads = "all"
    names: tuple[str, ...] = ()

    def look(self, site: SiteCall) -> Any:
        found = {name: site.share((name,)) for name in self.names}
        _KEPT[id(self)][site.site] = found
        return found


_KEPT: dict[int, dict[Site, dict[str, Tensor]]] = {}


@contextmanager
def masses(
    model: nn.Module, spans: Mapping[str, Any], towers: tuple[str, ...] | None = None
) -> Iterator[dict[Site, dict[str, Tensor]]]:
    r"""The share of attention that each span gets, of the last forward, differentiable.

    .. math:: m_i(S) = \sum_{j \in S} p_{ij}

    Args:
        model: any model that can be steered. spans: as in `steer`. towers: where to look; None
            where the model has one. For the words of a prompt in a diffusion model, ``("cross",)``.

    Yields:
        a dictionary, filled by each forward: ``found[site][name]`` is ``(batch, heads, queries)``,
        under the edits of the contexts around, with gradients to whatever the forward was given
        (the latents of a diffusion model).

    Cost: one more attention call per span and layer; no map is built.
    """
    names = tuple(spans)
    if not names:
        raise AttnbiasError('masses needs a span, as in {"cat": (2, 3)}.')
    rule = _Masses(names=names, towers=towers)
    kept = _KEPT[id(rule)] = {}
    try:
        with steer(model, rule, spans=spans):
            yield kept
    finally:
        del _KEPT[id(rule)]
