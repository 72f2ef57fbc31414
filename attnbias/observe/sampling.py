"""A sample of the queries of a call instead of all of them, with a stated error.

The real queries of a row of the batch stand in a ring that is cut into K strata of equal size (to
within one), begun at a random place; one query is drawn from each. Each query of the row is then
drawn with probability K / N exactly, the first and the last like any other, without replacement,
and the sample is spread evenly. Neighbouring strata are pairs. The standard error comes from
balanced repeated replication (McCarthy 1969): replicates weigh one query of each pair up and the
other down, with signs of a Hadamard matrix over classes of pairs; the spread of a value over the
replicates is its error. The weights move by ``sqrt(1 - K / N)``, which is the correction for a
finite population, so that a sample of all queries has the error 0. Difference of neighbours within
a stratum counts, a trend along the text does not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnbias.bias import Bias
from attnbias.errors import AttnbiasError, Refused
from attnbias.observe.rows import Part, chosen
from attnbias.observe.run import Run, grown, laid_out
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Gathered, Statistic, measure

if TYPE_CHECKING:
    from attnbias.hub import Call

CLASSES = (15, 7, 3, 1)  # of pairs of strata: as many degrees of freedom has the error


@dataclass(frozen=True)
class Draw:
    """The queries drawn in one call.

    Attributes:
        slots: (B, k) query slots in their order, -1 for none (a row with fewer queries).
        weights: (B,) how many queries each stands for. shrink: (B,) ``sqrt(1 - K / N)``, 0 where
            all queries of the row are taken.
        signs: (B, k) 1 or -1, the side within the pair. classes: (B, k) of the pair.
    """

    slots: Tensor
    weights: Tensor
    shrink: Tensor
    signs: Tensor
    classes: Tensor


class Sampler:
    """Draws K queries of each row in each call; the same draws for the same seed and calls.

    Args:
        queries: K, 2 or more; an odd number is taken as the next even one.
        seed: of all draws.
    """

    def __init__(self, queries: int, seed: int = 0) -> None:
        for name, value, least in (("queries", queries, 2), ("seed", seed, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnbiasError(
                    f"{name} must be a whole number of {least} or more, got {value!r}."
                )
        self.queries = queries + queries % 2
        self.classes = next(c for c in CLASSES if c <= self.queries // 2)
        self.signs = hadamard(self.classes + 1)[:, 1:]  # (replicates, classes)
        self._generator = generator(seed)

    def draw(self, real: Tensor) -> Draw | None:
        """A sample of the queries that are tokens, (B, N) bool; None where all are to be taken."""
        rows = [row.nonzero()[:, 0] for row in real.cpu()]
        if all(len(slots) <= self.queries for slots in rows):
            return None
        drawn = [self._row(slots) for slots in rows]
        slots, signs, classes = (
            torch.nn.utils.rnn.pad_sequence([d[n] for d in drawn], True, fill)
            for n, fill in ((0, -1), (1, 1), (2, 0))
        )
        size = torch.tensor([len(s) for s in rows]).clamp_min(1).double()
        taken = torch.tensor([len(d[0]) for d in drawn]).clamp_min(1).double()
        found = (slots, size / taken, (1 - taken / size).sqrt(), signs, classes)
        return Draw(*(part.to(real.device) for part in found))

    def _row(self, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size, draw = len(slots), self._random
        pairs = torch.arange(self.queries) // 2
        signs = (1 - 2 * (draw(self.queries // 2) < 0.5).long())[pairs]
        signs[1::2] *= -1
        if size <= self.queries:
            return slots, signs[:size], (pairs % self.classes)[:size]
        bounds = torch.arange(self.queries + 1) * size // self.queries
        width = bounds.diff()
        at = bounds[:-1] + torch.minimum((draw(self.queries) * width).long(), width - 1)
        at = (at + int(draw(1) * size)) % size
        order = at.argsort()
        return slots[at[order]], signs[order], (pairs % self.classes)[order]

    def _random(self, count: int) -> Tensor:
        return torch.rand(count, generator=self._generator, dtype=torch.float64)


def generator(*numbers: int) -> torch.Generator:
    """Random numbers from all of the numbers given: PyTorch's own seed heeds 32 bits of one."""
    digest = hashlib.sha256(repr(numbers).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


def hadamard(size: int) -> Tensor:
    """Sylvester's matrix of signs, `size` a power of two; its rows are orthogonal."""
    found = torch.ones(1, 1, dtype=torch.float64)
    while len(found) < size:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def check_sampled(statistics: list[Statistic]) -> None:
    """Refuse what cannot be told from a sample (see `Statistic.sampled`)."""
    for statistic in statistics:
        own = statistic.over == "query" and type(statistic).summary is not Statistic.summary
        if not (not own if statistic.sampled is None else statistic.sampled):
            raise Refused(
                f"{statistic.label} needs all queries and cannot be sampled; observe it without "
                "queries=."
            )


class SampledRun(Run):
    """A run of which each call adds the sums of the queries drawn, scaled up, and their spread."""

    def __init__(self, statistics: list[Statistic], scene: Scene, sampler: Sampler) -> None:
        super().__init__(statistics, scene)
        self.sampler = sampler
        self.drawn = [False] * len(statistics)
        self._weights: list[list[tuple[Tensor, Tensor]]] = [[] for _ in statistics]
        self._spread: list[Tensor | None] = [None] * len(statistics)
        shape = (scene.batch, scene.heads, sampler.classes)
        self._shaken = torch.zeros(shape, dtype=torch.float64, device=scene.device)

    def sample(
        self, call: Call, extra: Bias | None, scene: Scene, draw: Draw | None, *, fused: bool
    ) -> None:
        """Take in one call by a sample of its queries; without one, by all of them.

        Statistics that cost O(N) (the column of one key) take all queries in any case, where the
        log-sum-exp is known from the forward.
        """
        every = range(len(self.statistics))
        whole = [
            n for n in every
            if draw is None
            or (fused and scene.lse_known and _light(self.statistics[n], scene))
        ]  # fmt: skip
        some = [n for n in every if n not in whole]
        if whole:
            found = measure(scene, [self.statistics[n] for n in whole], fused=fused)
            for place, sums in zip(whole, found, strict=True):
                self._take(place, scene, sums)
        if draw is not None and some:
            self._take_drawn(call, extra, scene, draw, some)
        if not some or (draw is not None and scene.lse_known):
            self._queries += scene.counted.sum(-1)
        self._settle(scene)

    def _take_drawn(
        self, call: Call, extra: Bias | None, scene: Scene, draw: Draw, places: list[int]
    ) -> None:
        along = all(self.statistics[n].over == "query" for n in places)
        slots, owner, classes, signs = _grouped(draw, self.sampler.classes, along)
        part: Any = Part(call, slots, owner)
        sub = Scene(part, chosen(None if extra is None else extra.detach(), slots, owner))
        sub.spans = {name: span[owner] for name, span in scene.spans.items()}
        sub.targets = {name: at[owner] for name, at in scene.targets.items()}
        found = measure(sub, [self.statistics[n] for n in places], fused=False)
        batch, groups = scene.batch, len(slots) // scene.batch

        def apart(given: Tensor) -> Tensor:
            return given.view(batch, groups, *given.shape[1:])

        def flat(given: Tensor) -> Tensor:  # (B, G, H, k, ...) -> (B, H, G k, ...)
            return apart(given).movedim(1, 2).flatten(2, 3)

        counted = flat(sub.counted)
        positions = apart(sub.query_positions).flatten(1)
        sign = apart(signs).flatten(1) * draw.shrink[:, None]
        kind = apart(classes).flatten(1)
        weight = draw.weights[:, None].expand_as(sign)
        stands = torch.stack([weight, sign, kind.to(sign)], -1)[:, None]  # (B, 1, G k, 3)
        counts = counted.double() * (weight * sign)[:, None]
        spread = torch.zeros_like(self._shaken)
        spread.scatter_add_(2, kind[:, None].expand_as(counts), counts)
        if not scene.lse_known:
            self._queries += (counted * weight[:, None]).sum(-1)
            self._shaken += spread
        for place, sums in zip(places, found, strict=True):
            self.drawn[place] = True
            over = self.statistics[place].over
            if over == "query":
                values = flat(sums)
                shown = counted if values.ndim == 3 else counted[..., None]
                values = torch.where(shown, values, torch.nan).to(scene.query)
                self._parts[place].append((positions, values))
                self._weights[place].append((positions, stands))
                continue
            parts = apart(sums.double()) * draw.weights.view(-1, *(1,) * sums.ndim)
            tips = parts * draw.shrink.view(-1, *(1,) * sums.ndim)
            # Groups are (class, +), (class, -) in turn: what their difference adds to a replicate.
            tips = (tips[:, 0::2] - tips[:, 1::2]).movedim(1, -1).float()
            self._add_total(place, scene, parts.sum(1))
            old = self._spread[place]
            if over == "sequence":
                self._spread[place] = tips if old is None else old + tips
            else:
                self._spread[place] = grown(old, scene.key_positions, tips, torch.float32)

    def _take(self, place: int, scene: Scene, found: Tensor) -> None:
        super()._take(place, scene, found)
        if self.statistics[place].over == "query":
            ones = torch.zeros(scene.batch, 1, scene.queries, 3, dtype=torch.float64)
            ones[..., 0] = 1
            self._weights[place].append((scene.query_positions, ones.to(scene.device)))

    def gathered(self, place: int, signs: Tensor | None = None) -> Gathered:
        """The sums of one statistic; with signs (classes,), those of one replicate of the error."""
        plain = super().gathered(place)
        if not self.drawn[place]:
            return plain
        queries, sums, weights = plain.queries, plain.sums, None
        if signs is not None:
            queries = queries + self._shaken @ signs
        if self.statistics[place].over == "query":
            stands = laid_out(self._weights[place])[:, 0].nan_to_num(0.0)
            # The last queries may not be drawn; they are positions all the same.
            short = int(self._last.amax()) + 1 - sums.shape[2]
            sums = _longer(sums, short, torch.nan)
            stands = torch.nn.functional.pad(stands, (0, 0, 0, short))
            weights, sign, kind = stands.unbind(-1)
            if signs is not None:
                weights = weights * (1 + sign * signs[kind.long()])
        elif signs is not None:
            spread = self._spread[place]
            assert spread is not None
            more = (spread.double() @ signs).nan_to_num(0.0)
            if self.statistics[place].over == "key":  # calls taken whole may have added keys since
                more = _longer(more, sums.shape[2] - more.shape[2], 0.0)
            sums = sums + more
        return Gathered(sums, queries, weights)


def _longer(given: Tensor, by: int, value: float) -> Tensor:
    """(batch, heads, positions, ...) with more positions."""
    return torch.nn.functional.pad(given, (*(0, 0) * (given.ndim - 3), 0, by), value=value)


def _light(statistic: Statistic, scene: Scene) -> bool:
    return statistic.light(scene) and statistic.plan(scene)


def _grouped(draw: Draw, classes: int, together: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sample as rows of a batch: (slots, row of the batch, class, sign), each (B G, k) but the
    second, (B G,). One group for each row of the batch, or one for each class and sign."""
    batch = len(draw.slots)
    groups = 1 if together else 2 * classes
    if together:
        owner = torch.arange(batch, device=draw.slots.device)
        return draw.slots, owner, draw.classes, draw.signs
    group = 2 * draw.classes + (draw.signs < 0)
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for b in range(batch):
        for g in range(groups):
            here = (group[b] == g) & (draw.slots[b] >= 0)
            rows.append((draw.slots[b][here], draw.classes[b][here], draw.signs[b][here]))
    slots, kinds, signs = (
        torch.nn.utils.rnn.pad_sequence([row[n] for row in rows], True, fill)
        for n, fill in ((0, -1), (1, 0), (2, 1))
    )
    owner = torch.arange(batch, device=slots.device).repeat_interleave(groups)
    return slots, owner, kinds, signs


def estimated(
    statistic: Statistic, runs: list[Run], place: int, signs: Tensor
) -> tuple[Tensor, Tensor]:
    """A statistic's summary over sampled runs, and its standard error: (heads[, channels]) each.

    The error is the root mean square of what the replicates differ by. Where the summary is no mean
    over queries (the largest of the sums over queries, say) it is biased though the sums are not;
    by how much shows in the mean of the replicates, and is taken off. A mean stays as it is.
    """

    def summary(one: Tensor | None) -> Tensor:
        parts = [
            r.gathered(place, None if one is None else one.to(r.device))
            if isinstance(r, SampledRun)
            else r.gathered(place)
            for r in runs
        ]
        return statistic.summary(parts).double().cpu()

    value = summary(None)
    replicates = torch.stack([summary(one) for one in signs])
    error = (replicates - value).square().nanmean(0).sqrt()
    if statistic.over != "query":
        value = 2 * value - replicates.nanmean(0)
    return value, error
