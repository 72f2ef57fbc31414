"""Share of attention that goes to named parts of the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class Share(Statistic):
    r"""Share of a query's attention that goes to each named span of the keys.

    .. math:: S_i(g) = \sum_{j \in g} p_{ij}

    The spans are those given to ``observe(..., spans={name: (start, stop)})``, in absolute token
    positions of the key sequence (in cross-attention: of the encoder). Spans may overlap or leave
    tokens out.

    Values: ``(batch, head, query, span)``. Table: one line for each span, ``share[name]``, the mean
    over all real queries of all rows.
    Cost: a part of one compiled sweep. Without it one unbiased call with the spans as values, for
    as many spans as a head has dimensions.

    Args:
        names: the spans wanted; all of them where nothing is given.
    """

    name: ClassVar[str] = "share"
    gives_lse: ClassVar[bool] = True
    swept: ClassVar[tuple[str, ...]] = ("features",)
    names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        names = self.names
        if names is None:
            return
        if isinstance(names, str) or not all(isinstance(n, str) for n in names) or not names:
            raise AttnbiasError(f"Share(names) takes a tuple of span names, got {names!r}.")
        object.__setattr__(self, "names", tuple(names))

    def check(self, spans: tuple[str, ...]) -> None:
        missing = sorted(set(self.names or ()) - set(spans))
        if not spans or missing:
            raise AttnbiasError(
                f"Share needs the spans {', '.join(missing) or 'it is to report'}, and observe() "
                f"was given {', '.join(spans) or 'none'}; write "
                "observe(..., spans={name: (start, stop)})."
            )

    def _names(self, spans: tuple[str, ...]) -> tuple[str, ...]:
        return spans if self.names is None else self.names

    def channels(self, scene: Scene) -> int:
        return len(self._names(tuple(scene.spans)))

    def _groups(self, scene: Scene) -> Tensor:
        names = self._names(tuple(scene.spans))
        return torch.stack([scene.in_span(n) for n in names], -1).to(scene.query)

    def tile(self, tile: Tile) -> Tensor:
        groups = self._groups(tile.scene)[tile.batch, tile.cols]
        return tile.probabilities @ groups[:, None]

    def plan(self, scene: Scene) -> bool:
        scene.features.ask(self.label, self._groups(scene))
        return True

    def fused(self, scene: Scene) -> Tensor:
        return scene.features.mean(self.label)

    def axes(self) -> tuple[str, ...]:
        return ("query", "span")

    def labels(self, spans: tuple[str, ...]) -> dict[str, list[str]]:
        return {"span": list(self._names(spans))}
