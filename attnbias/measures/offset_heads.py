"""Heads of a vision model that look at a neighbour at a fixed offset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Scores, gather
from attnbias.measures.seeing import by_sample, layers_of, looked, tower_of
from attnbias.observe.grid import Grid


@dataclass(frozen=True)
class OffsetHeads(HeadMeasure):
    r"""Offset local attention heads: their aligned map peaks beside the patch that attends.

    .. math:: s = \max_{0 < \lVert \delta \rVert_\infty \le r} A_{\delta}

    with :math:`A` the aligned map (`statistics.Aligned`): the share of the attention among patches
    that goes to one fixed neighbour. `details` of the result hold, as means over the images,
    "maps" ``(layers, heads, down, across)``, "centre" ``(layers, heads, 2)`` their centre of mass
    (-1 to 1), "peak" ``(layers, heads, 2)`` the offset of the largest entry in patches (down,
    across), "distance" the mean distance of attention in the unit of the image's side, and "class"
    the share of attention on tokens that are no patch; `kind` names a head by them.

    Args:
        grid: of the patches; None reads it off the model and each forward's ``pixel_values``.
        reach: how far a neighbour may be, in patches. threshold: what `kind` calls local.

    Cost: the forward, and tiles: of the order of an eager map's time, O(tokens) memory.

    Source: Teaching Matters: Investigating the Role of Supervision in Vision Transformers (2022,
    arXiv 2212.03862); authors' code read (distance, aligned maps, centres). The work names such
    heads by looking at their maps; the score, `reach` and `threshold` are chosen here. Its
    measurement of attention on the class token reads the entry of the first patch; here it is all
    that does not go to patches.
    """

    name: ClassVar[str] = "offset_heads"
    grid: Grid | None = None
    reach: int = 1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.reach, int) or isinstance(self.reach, bool) or self.reach < 1:
            raise AttnbiasError(
                f"OffsetHeads(reach) must be a whole number of patches from 1, got {self.reach!r}."
            )
        if not 0 < self.threshold < 1:
            raise AttnbiasError(
                f"OffsetHeads(threshold) must be between 0 and 1, got {self.threshold!r}."
            )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        """A score for each image and head; see `Measure.measure`."""
        from attnbias.observe import statistics
        from attnbias.observe.statistics.aligned import centre

        given = forwards(data, "OffsetHeads")
        tower = tower_of(model, "OffsetHeads", None, "vision")
        maps, far, off = [], [], []
        layers: tuple[int, ...] = ()
        with evaluating(model), torch.no_grad(), bar(len(given), "offset heads", progress) as tick:
            for inputs in given:
                grid = self.grid or Grid.of(model, inputs)
                wanted = [
                    statistics.Aligned(grid), statistics.GridDistance(grid), statistics.Hops(grid),
                ]  # fmt: skip
                seen = looked(model, inputs, list(wanted), tower)
                maps.append(by_sample(seen, "aligned", tower))
                far.append(by_sample(seen, "grid_distance", tower).nanmean(-1))
                off.append(1 - by_sample(seen, "hops", tower).sum(-1))
                layers = layers_of(seen, "hops", tower)
                tick()
        if len({one.shape[-2:] for one in maps}) > 1:
            raise AttnbiasError("OffsetHeads: the images differ in size; measure each size alone.")
        whole = torch.cat(maps)
        mean = whole.nanmean(0)
        details = {
            "maps": mean, "centre": centre(mean), "peak": peak(mean),
            "distance": gather(far).nanmean(0), "class": gather(off).nanmean(0),
        }  # fmt: skip
        return Scores(self.name, tower, layers, beside(whole, self.reach), details=details)

    def kind(self, scores: Scores, layer: int, head: int) -> str:
        """ "offset local", "local" (on the patch itself), "class" or "global"."""
        row = scores.layers.index(layer)
        maps, mass = scores.details["maps"][row, head], scores.details["class"][row, head]
        if float(mass) > self.threshold:
            return "class"
        if scores.of(layer, head) > self.threshold:
            return "offset local"
        down, across = (size // 2 for size in maps.shape)
        return "local" if float(maps[down, across]) > self.threshold else "global"


def beside(maps: Tensor, reach: int) -> Tensor:
    """``(...)``: the largest entry of aligned maps within `reach` of the middle, not the middle."""
    down, across = (size // 2 for size in maps.shape[-2:])
    high, wide = min(reach, down), min(reach, across)
    part = maps[..., down - high : down + high + 1, across - wide : across + wide + 1].clone()
    part[..., high, wide] = -1
    best = part.flatten(-2).nan_to_num(-1).amax(-1)
    return torch.where(best >= 0, best, torch.nan)


def peak(maps: Tensor) -> Tensor:
    """``(..., 2)``: the offset (down, across) in patches of the largest entry of aligned maps."""
    down, across = maps.shape[-2:]
    place = maps.nan_to_num(-1).flatten(-2).argmax(-1)
    return torch.stack([place // across - down // 2, place % across - across // 2], -1)
