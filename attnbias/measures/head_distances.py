"""How unlike the attention of any two heads is, and a plane in which like heads stand together."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.measures.losses import tower_sites
from attnbias.measures.scores import Head
from attnbias.observe.observer import observe
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile


@dataclass(frozen=True)
class _Map(Statistic):
    """The whole map of a call by key position: for measures that compare maps of short texts."""

    name: ClassVar[str] = "map"

    def channels(self, scene: Scene) -> int:
        return int(scene.key_positions.amax()) + 1

    def tile(self, tile: Tile) -> Tensor:
        p = tile.probabilities
        found = p.new_zeros(*p.shape[:3], self.channels(tile.scene))
        at = tile.key_positions[:, None, None].expand_as(p)
        return found.scatter_add(-1, at.clamp_min(0), p * (at >= 0))

    def axes(self) -> tuple[str, ...]:
        return ("query", "key")


@dataclass(frozen=True)
class Distances:
    """Distances between heads.

    Attributes:
        heads: ``(layer, head)`` of each row. values: ``(heads, heads)``, in nats. tower: of the
            model. tokens: how many queries the mean is over.
    """

    tower: str
    heads: tuple[Head, ...] = field(repr=False)
    values: Tensor = field(repr=False)
    tokens: int = 0

    def nearest(self, head: Head, count: int = 1) -> tuple[Head, ...]:
        """The heads that are least unlike one."""
        if head not in self.heads:
            raise AttnbiasError(f"there is no layer {head[0]}, head {head[1]}.")
        row = self.values[self.heads.index(head)]
        order = sorted(range(len(row)), key=lambda n: (float(row[n]), n))
        return tuple(self.heads[n] for n in order if self.heads[n] != head)[:count]

    def points(self, dimensions: int = 2, rounds: int = 300) -> Tensor:
        """``(heads, dimensions)``: metric multidimensional scaling, distances kept as well as can
        be (the least sum of squared errors): SMACOF from the classical solution."""
        want = self.values.double()
        count = len(want)
        centre = torch.eye(count, dtype=torch.float64) - 1 / count
        power, axes = torch.linalg.eigh(-centre @ want.square() @ centre / 2)
        found = axes[:, -dimensions:] * power[-dimensions:].clamp_min(0).sqrt()
        for _ in range(rounds):
            have = torch.cdist(found, found)
            ratio = torch.where(have > 1e-12, want / have.clamp_min(1e-12), 0.0)
            pull = torch.diag(ratio.sum(1)) - ratio
            found = pull @ found / count
        points: Tensor = found.flip(1)
        return points


@dataclass(frozen=True)
class HeadDistances(Measure):
    r"""The Jensen-Shannon divergence between the attention of any two heads, mean over the tokens.

    .. math:: d(a, b) = \mathbb{E}_i\, \mathrm{JS}\big(\tilde p^a_i, \tilde p^b_i\big), \qquad
              \tilde p = (1 - s)\, p + s / n

    Args:
        smoothing: s (0.001 in the authors' code); n is the number of tokens of the row.
        tower: which one; by default "text", or the only one.

    Returns:
        `Distances`, between 0 and ln 2; ``points()`` places the heads in a plane.

    Cost: one forward; all maps of one forward are held, O(heads N^2), and every pair of heads is
    compared, O(heads^2 N^2): for short texts.

    Raises:
        AttnbiasError: no data, smoothing outside of 0 to 1.

    Source: What Does BERT Look At? An Analysis of BERT's Attention (2019, arXiv 1906.04341),
    section 6; authors' code read, which has the sum over the tokens where this is the mean,
    and leaves the scaling to a library.
    """

    name: ClassVar[str] = "head_distances"
    smoothing: float = 0.001
    tower: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1:
            raise AttnbiasError(f"smoothing must be 0 or more and below 1, got {self.smoothing!r}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Distances:
        given, where = forwards(data, "HeadDistances"), tower_sites(model, self.tower)
        tower, layers = where[0].tower, [site.layer for site in where]
        total, tokens, heads = torch.zeros(()).double(), 0, []
        with evaluating(model), torch.no_grad(), bar(len(given), "head maps", progress) as tick:
            for inputs in given:
                with observe(model, [_Map()], layers={tower: layers}) as seen:
                    model(**inputs)
                values = seen.tensor("map", tower).values[0]  # layer, batch, head, query, key
                alive = ~values.isnan().all(-1).all(-1).all(1)  # layers may differ in heads
                heads = [(layers[int(a)], int(b)) for a, b in alive.nonzero()]
                for row in range(values.shape[1]):
                    table = values[:, row][alive]
                    real = ~table.isnan().all(-1).all(0)
                    length = int(real.sum())
                    total = total + self._pairs(table[:, real][..., :length])
                    tokens += length
                tick()
        return Distances(tower, tuple(heads), total / tokens, tokens)

    def _pairs(self, table: Tensor) -> Tensor:
        """``(heads, heads)``: the sum over the queries of (heads, queries, keys)."""
        smooth = (1 - self.smoothing) * table.nan_to_num(0.0) + self.smoothing / table.shape[-1]
        own = _entropy(smooth)
        rows = [(_entropy((one + smooth) / 2) - (own[n] + own) / 2) for n, one in enumerate(smooth)]
        return torch.stack(rows).sum(-1).clamp_min(0)


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)
