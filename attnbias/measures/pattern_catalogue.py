"""A catalogue of the patterns of attention maps: an autoencoder, and clusters of its codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.measures.seeing import by_sample, layers_of, looked, tower_of
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile

TOKENS = 1024
HIDDEN, BATCH, RATE = 64, 64, 3e-3


@dataclass(frozen=True)
class Patterns:
    """Typical attention maps, and which head shows which.

    Attributes:
        layers: number of each row. labels: ``(samples, layers, heads)`` pattern numbers, -1 where
            there is no head; the commonest pattern is 0.
        typical: ``(patterns, side, side)``: the mean map of each, queries downwards.
        codes: ``(samples, layers, heads, size)``: where each map lies in the latent space.
        error: mean squared error of the autoencoder, and of the mean map in its place.
    """

    layers: tuple[int, ...]
    labels: Tensor
    typical: Tensor
    codes: Tensor
    error: tuple[float, float]

    def shares(self) -> Tensor:
        """``(patterns)``: the part of all maps that shows each pattern."""
        known = self.labels[self.labels >= 0]
        return torch.bincount(known, minlength=len(self.typical)).double() / len(known)

    def of(self, layer: int, head: int) -> int:
        """The pattern that a head shows most often, the lower number of equal ones."""
        if layer not in self.layers or not 0 <= head < self.labels.shape[2]:
            raise AttnbiasError(f"there is no layer {layer}, head {head} in the catalogue.")
        found = self.labels[:, self.layers.index(layer), head]
        return int(torch.bincount(found[found >= 0], minlength=len(self.typical)).argmax())

    def name(self, pattern: int) -> str:
        """The nearest plain word for a pattern, by the share of its typical map that it explains:
        "diagonal", "near the diagonal", "stripes" (few keys for all queries), "even", or "blocks"
        (what none of these is)."""
        p = self.typical[pattern]
        p = p / p.sum(-1, keepdim=True)
        side = len(p)
        gap = (torch.arange(side)[:, None] - torch.arange(side)).abs()
        if float((p * (gap == 0)).sum() / side) > 0.5:
            return "diagonal"
        if float((p * (gap <= max(side // 8, 1))).sum() / side) > 0.5:
            return "near the diagonal"
        column = p.mean(0)
        apart = (p - column).abs().sum(-1).mean() / 2  # total variation of a row from the mean row
        if float(apart) < 0.25:
            return "stripes" if float(column.amax()) > 3 / side else "even"
        return "blocks"


@dataclass(frozen=True)
class PatternCatalogue(Measure):
    r"""Typical attention patterns of all heads, by an autoencoder of their maps.

    Every map of every head and image is brought to `side` x `side` (the mean over pieces of equal
    size), an autoencoder learns to give the maps back from a code of `size` numbers, and the codes
    are put into `patterns` groups by k-means. The result says which head shows which pattern, and
    what each pattern looks like.

    Args:
        patterns: how many groups. side: of the maps that are compared. size: of a code.
        steps: of training, on 64 maps each. seed: of the autoencoder, batches and first centres.
        tower: which one, where a model has several; by default "vision", else "text".

    Cost: the forward from tiles, and O(heads tokens^2) memory for one batch at a time, so at most
    1,024 tokens; the training is seconds.

    Raises:
        AttnbiasError: no data, fewer maps than patterns. Refused: more than 1,024 tokens.

    Source: after How Does Attention Work in Vision Transformers? A Visual Analytics Attempt (2023,
    arXiv 2303.13731), abstract only: the sizes, the plain two-layer autoencoder, k-means and the
    words for patterns are chosen here.
    """

    name: ClassVar[str] = "pattern_catalogue"
    patterns: int = 6
    side: int = 16
    size: int = 8
    steps: int = 300
    seed: int = 0
    tower: str | None = None

    def __post_init__(self) -> None:
        for word, least in (("patterns", 1), ("side", 2), ("size", 1), ("steps", 1)):
            value = getattr(self, word)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnbiasError(
                    f"PatternCatalogue({word}) must be a whole number from {least}, got {value!r}."
                )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Patterns:
        """The catalogue of all maps of the data; see `Measure.measure`."""
        given = forwards(data, "PatternCatalogue")
        tower = tower_of(model, "PatternCatalogue", self.tower, "vision")
        parts: list[Tensor] = []
        layers: tuple[int, ...] = ()
        with evaluating(model), torch.no_grad(), bar(len(given), "patterns", progress) as tick:
            for inputs in given:
                seen = looked(model, inputs, [_Maps()], tower)
                maps = by_sample(seen, "maps", tower)
                parts.append(torch.stack([self._square(one) for one in maps]))
                layers = layers_of(seen, "maps", tower)
                tick()
        return self.catalogue(torch.cat(parts), layers)

    def _square(self, maps: Tensor) -> Tensor:
        """One row's maps (layers, heads, N, N) at the common size, each row summing to 1."""
        real = ~maps[0, 0].isnan().all(-1)
        whole = maps[:, :, real][..., real].nan_to_num(0.0)
        found = torch.nn.functional.adaptive_avg_pool2d(whole, (self.side, self.side))
        return found / found.sum(-1, keepdim=True).clamp_min(1e-30)

    def catalogue(self, maps: Tensor, layers: tuple[int, ...]) -> Patterns:
        """The same from maps ``(samples, layers, heads, side, side)``, rows summing to 1."""
        flat = maps.flatten(0, 2).flatten(1).float()
        if len(flat) < self.patterns:
            raise AttnbiasError(
                f"PatternCatalogue: {len(flat)} maps came for {self.patterns} patterns; give more "
                "images or ask for fewer."
            )
        generator = torch.Generator().manual_seed(self.seed)
        codes, error = self._encode(flat, generator)
        groups = clusters(codes, self.patterns, generator)
        order = torch.bincount(groups, minlength=self.patterns).argsort(descending=True)
        labels = torch.empty_like(order)
        labels[order] = torch.arange(len(order))
        groups = labels[groups]
        typical = flat.new_zeros(self.patterns, flat.shape[1]).index_add_(0, groups, flat)
        typical = typical / torch.bincount(groups, minlength=self.patterns).clamp_min(1)[:, None]
        shape = maps.shape[:3]
        return Patterns(
            layers, groups.reshape(shape), typical.reshape(-1, self.side, self.side).double(),
            codes.reshape(*shape, -1).double(), error,
        )  # fmt: skip

    def _encode(
        self, maps: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, tuple[float, float]]:
        """Codes of the maps (rows, side^2), and the errors of the autoencoder and of the mean."""
        scaled = maps * self.side  # an even map is all ones
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(self.seed)
            width = maps.shape[1]
            encoder = nn.Sequential(
                nn.Linear(width, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, self.size)
            )
            decoder = nn.Sequential(
                nn.Linear(self.size, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, width)
            )
            both = [*encoder.parameters(), *decoder.parameters()]
            optimizer = torch.optim.Adam(both, RATE)
            for _ in range(self.steps):
                rows = torch.randint(len(scaled), (min(BATCH, len(scaled)),), generator=generator)
                batch = scaled[rows]
                loss = (decoder(encoder(batch)) - batch).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            codes = encoder(scaled)
            left = float((decoder(codes) - scaled).square().mean())
            plain = float((scaled - scaled.mean(0)).square().mean())
        return codes, (left, plain)


def clusters(points: Tensor, count: int, generator: torch.Generator, rounds: int = 50) -> Tensor:
    """``(rows)``: the group of each point by k-means, the first centres drawn far apart."""
    first = int(torch.randint(len(points), (1,), generator=generator))
    centres = points[first][None]
    while len(centres) < count:
        gap = torch.cdist(points, centres).amin(-1).square().double()
        weight = gap if float(gap.sum()) > 0 else torch.ones_like(gap)
        new = int(torch.multinomial(weight, 1, generator=generator))
        centres = torch.cat([centres, points[new][None]])
    groups = torch.cdist(points, centres).argmin(-1)
    for _ in range(rounds):
        centres = torch.stack([
            points[groups == n].mean(0) if bool((groups == n).any()) else centres[n]
            for n in range(count)
        ])  # fmt: skip
        new_groups = torch.cdist(points, centres).argmin(-1)
        if torch.equal(new_groups, groups):
            break
        groups = new_groups
    return groups


@dataclass(frozen=True)
class _Maps(Statistic):
    """The map itself; small sequences only."""

    name: ClassVar[str] = "maps"

    def channels(self, scene: Scene) -> int:
        if scene.keys > TOKENS:
            raise Refused(
                f"PatternCatalogue keeps whole maps, at most of {TOKENS} tokens, and {scene.keys} "
                "came; give smaller images or shorter texts."
            )
        return scene.keys

    def tile(self, tile: Tile) -> Tensor:
        whole = tile.probabilities.new_zeros(*tile.probabilities.shape[:3], tile.scene.keys)
        for row in range(len(whole)):  # by position: padding keys hold nothing
            real = tile.key_positions[row] >= 0
            at = tile.key_positions[row, real]
            whole[row][..., at] = tile.probabilities[row][..., real]
        return whole

    def axes(self) -> tuple[str, ...]:
        return ("query", "at")
