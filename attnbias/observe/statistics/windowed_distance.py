"""How far away a query looks, far keys counting as no further than a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attnbias.bias import Bias, Window
from attnbias.errors import AttnbiasError
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile

FEW = 64  # up to this many keys beside each query, they are looked up one by one


@dataclass(frozen=True)
class WindowedDistance(Statistic):
    r"""Mean distance between a query and the keys it attends to, capped at a window (WAAD).

    .. math:: \mathrm{WAAD}_i = \sum_j p_{ij}\, \min(|i - j|, W)

    Between 0 (the token itself) and W (everything further back). Averaged over local heads it rises
    where a model plans a stretch of text anew and falls inside of it.

    Values: ``(batch, head, query)``, in tokens. Table: the mean over all real queries of all rows.
    Cost: within a sequence, for windows up to 64, the entries of the near keys and one unbiased
    call for the share of the far ones (two calls where queries look both ways); tiles otherwise.

    Args:
        window: W, in tokens; 10 as published.

    Source: Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained
    Policy Optimization, 2025 (arXiv 2510.13554); equations read. The work has decoders, where all
    keys are before the query; elsewhere the distance counts on both sides.
    """

    name: ClassVar[str] = "windowed_distance"
    window: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise AttnbiasError(
                f"WindowedDistance(window) must be a whole number of tokens from 1, got "
                f"{self.window!r}."
            )

    def tile(self, tile: Tile) -> Tensor:
        gap = (tile.query_positions[:, :, None] - tile.key_positions[:, None, :]).abs()
        capped = gap.clamp_max(self.window).to(tile.probabilities)
        return (tile.probabilities * capped[:, None]).sum(-1)

    def plan(self, scene: Scene) -> bool:
        return scene.own_slot is not None and self.window <= FEW

    def fused(self, scene: Scene) -> Tensor:
        after = 0 if scene.causal else self.window - 1
        steps = torch.arange(1 - self.window, after + 1, device=scene.device)
        at = scene.query_positions[..., None] + steps
        at = torch.where(scene.real[..., None], at, -1).clamp_min(-1)
        near = scene.entries(scene.slots(at)).double() @ steps.abs().double()
        return torch.where(scene.counted, near + self.window * self._far(scene), 0.0)

    def _far(self, scene: Scene) -> Tensor:
        """(B, H, N): the share of the keys at least a window away, from their log-sum-exp."""
        assert scene.own_slot is not None
        size = {"queries": scene.queries, "keys": scene.keys, "offset": scene.own_slot}
        halves = [Window(None, -self.window, **size, device=scene.device)]
        if not scene.causal:
            halves.append(Window(-self.window, None, **size, device=scene.device))
        far = torch.zeros_like(scene.lse, dtype=torch.float64)
        for half in halves:
            bias: Bias = half if scene.bias is None else scene.bias + half
            lse = scene.attend(scene.query, scene.key, scene.key, bias, False)[1]
            far += torch.where(scene.counted, lse - scene.lse, -torch.inf).double().exp()
        return far
