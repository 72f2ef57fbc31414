"""AdaptiveHeads: which queries of which heads need keys beyond the first and the nearest ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating, forwards
from attnbias.measures.scores import Scores, gather
from attnbias.observe.scene import Scene
from attnbias.observe.statistic import Statistic
from attnbias.observe.tiles import Tile

LOCAL, BULK, COUNT, SUM, SQUARES, GUESS = range(6)


@dataclass(frozen=True)
class Moments:
    r"""Mean and covariance of the keys of one layer beyond the first ones.

    Attributes:
        mean: ``(key heads, dim)``. covariance: ``(key heads, dim, dim)``.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class _Scored(Statistic):
    """Per query: mass on local keys and on the bulk, and the first moments of the bulk's scores.

    Scores count from the row's log-sum-exp, as everything is compared within a row. With `moments`
    the last channel is the bulk's mass by them, as a logarithm for each key.
    """

    name: ClassVar[str] = "scored"
    sinks: int = 16
    window: int = 112
    moments: Mapping[int, Moments] | None = None

    @property
    def label(self) -> str:
        return self.name

    def channels(self, scene: Scene) -> int:
        return 6

    def tile(self, tile: Tile) -> Tensor:
        keys, queries = tile.key_positions[:, None, None], tile.query_positions[:, None, :, None]
        local = (keys < self.sinks) | ((queries - keys).abs() < self.window)
        seen = (tile.scores > -torch.inf) & (keys >= 0) & (queries >= 0)
        bulk = seen & ~local
        p = tile.probabilities.double()
        log = (tile.scores - tile.lse[..., None]).double().masked_fill(~bulk, 0.0)
        parts = [(p * (seen & local)).sum(-1), (p * bulk).sum(-1), bulk.sum(-1).double()]
        parts += [log.sum(-1), log.square().sum(-1)]
        guess = torch.zeros_like(parts[0])
        if self.moments is not None and tile.cols.start == tile.scene.span(tile.rows)[0]:
            guess = self._guess(tile)
        return torch.stack([*parts, guess], -1)

    def _guess(self, tile: Tile) -> Tensor:
        r"""(b, h, r): ``s q mu + s^2 q Sigma q / 2 - lse``, once for each row."""
        assert self.moments is not None
        scene = tile.scene
        own = self.moments[scene.site.layer]
        share = scene.heads // scene.groups
        index = torch.arange(tile.heads.start, tile.heads.stop, device=scene.device) // share
        query = scene.query[tile.batch, tile.heads, tile.rows].double() * scene.scale
        mean, spread = own.mean.to(query)[index], own.covariance.to(query)[index]
        first = torch.einsum("bhnd,hd->bhn", query, mean)
        second = torch.einsum("bhnd,hde,bhne->bhn", query, spread, query)
        lse = tile.lse.double()
        return torch.where(lse > -torch.inf, first + second / 2 - lse, 0.0)

    def axes(self) -> tuple[str, ...]:
        return ("query", "of")


@dataclass(frozen=True)
class AdaptiveScores(Scores):
    """Heads by the share of their queries that need the bulk, with the decision of each query.

    Attributes:
        estimated, exact: ``(samples, layers, heads, queries)``: the local share of the mass, with
            the bulk's mass estimated and exact; NaN where there is no query.
    """

    estimated: Tensor = field(default_factory=lambda: torch.empty(0))
    exact: Tensor = field(default_factory=lambda: torch.empty(0))

    def long(self, threshold: float, *, exact: bool = False) -> Tensor:
        """Which queries need the bulk at a threshold, ``(samples, layers, heads, queries)``."""
        share = self.exact if exact else self.estimated
        return share < threshold  # NaN is no query: False

    def agreement(self, threshold: float, oracle: float | None = None) -> dict[str, float]:
        """How well the estimate finds the queries that need the bulk.

        Args:
            threshold: of the estimate. oracle: of the exact share; None: the same.

        Returns:
            "accuracy", "precision" and "recall" of "needs the bulk", "local" (the share of queries
            that the estimate calls local) and "oracle" (the same by the exact share).
        """
        known = ~self.exact.isnan()
        said = self.long(threshold)[known]
        true = self.long(threshold if oracle is None else oracle, exact=True)[known]
        both = float((said & true).sum())
        return {
            "accuracy": float((said == true).double().mean()),
            "precision": both / max(float(said.sum()), 1.0),
            "recall": both / max(float(true.sum()), 1.0),
            "local": float((~said).double().mean()),
            "oracle": float((~true).double().mean()),
        }


@dataclass(frozen=True)
class AdaptiveHeads(HeadMeasure):
    r"""Decide for each head and query, from local keys alone, whether distant keys are needed.

    .. math:: \text{local}_i \iff \frac{A_{\text{loc}}}{A_{\text{loc}} + \hat A_{\text{bulk}}}
        \ge \tau, \qquad \hat A_{\text{bulk}} = T\, e^{\mu_s + \sigma_s^2 / 2}, \qquad
        \mu_s = s\, q_i \cdot \mu_K, \quad \sigma_s^2 = s^2\, q_i^\top \Sigma_K\, q_i

    with :math:`A_{\text{loc}} = \sum_j e^{s_{ij}}` over the first `sinks` tokens and the nearest
    `window` ones, T the number of other keys that the query sees (the bulk), and the bulk's scores
    taken as normal. Rows of samples are texts; values are the share of a head's queries that need
    the bulk; `control` is the same with the exact bulk mass (the oracle).

    Args:
        sinks: first tokens that always count as local; 16 as published.
        window: nearest tokens that count as local, the query's own included (on both sides where
            the model looks both ways).
        threshold: tau; the work sweeps it (`AdaptiveScores.agreement` at any other).
        moments: None: mean and covariance are those of the bulk keys that each query sees (from the
            current prompt); else by layer, from `moments_of` (another prompt, random tokens).

    Returns:
        `AdaptiveScores`, which is a `Scores`.

    Cost: tiles, as the exact mass is reported beside the estimate; the decision alone takes the
    local keys and one quadratic form in the head size for each query, whatever the length.

    Raises:
        AttnbiasError: numbers out of range.

    Source: after Unveiling Simplicities of Attention: Adaptive Long-Context Head Identification,
    2025 (arXiv 2502.09647); abstract only, with the equations from reviews of it. Left open and
    chosen here: the window (112, so that 128 keys are local) and the threshold (0.6). A query that
    has no bulk is local.
    """

    name: ClassVar[str] = "long_context"
    sinks: int = 16
    window: int = 112
    threshold: float = 0.6
    moments: Mapping[int, Moments] | None = None

    def __post_init__(self) -> None:
        for word, least in (("sinks", 0), ("window", 1)):
            value = getattr(self, word)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise AttnbiasError(f"{word} must be a whole number from {least}, got {value!r}.")
        if not 0 < self.threshold <= 1:
            raise AttnbiasError(f"threshold must be above 0 to 1, got {self.threshold!r}.")

    def parameters(self) -> dict[str, object]:
        given = None if self.moments is None else sorted(self.moments)
        return {**super().parameters(), "moments": given}

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> AdaptiveScores:
        from attnbias.observe import observe

        given = forwards(data, "AdaptiveHeads")
        statistic = _Scored(self.sinks, self.window, self.moments)
        parts: list[Tensor] = []
        with evaluating(model), torch.no_grad(), bar(len(given), self.name, progress) as tick:
            for forward in given:
                with observe(model, [statistic]) as seen:
                    model(**forward)
                towers = [site.tower for site in seen.sites]
                tower = "text" if "text" in towers else towers[0]
                found = seen.tensor(statistic.label, tower)
                parts.append(found.values[0].movedim(1, 0))  # (batch, layers, heads, queries, of)
                tick()
        exact = [_share(part[..., LOCAL], part[..., BULK]) for part in parts]
        guess = [_share(part[..., LOCAL], self._bulk(part)) for part in parts]
        return AdaptiveScores(
            self.name,
            tower,
            tuple(found.labels["layer"]),
            gather([_long(share, self.threshold) for share in guess]),
            gather([_long(share, self.threshold) for share in exact]),
            estimated=_padded(guess),
            exact=_padded(exact),
        )

    def _bulk(self, part: Tensor) -> Tensor:
        """The estimate of the bulk's mass in units of the row's sum."""
        count = part[..., COUNT]
        log = part[..., GUESS]
        if self.moments is None:
            mean = part[..., SUM] / count.clamp_min(1)
            spread = part[..., SQUARES] / count.clamp_min(1) - mean.square()
            log = mean + spread.clamp_min(0) / 2
        return torch.where(count == 0, 0.0, count * log.exp())


def moments_of(
    model: nn.Module, inputs: Mapping[str, Any], *, sinks: int = 16
) -> dict[int, Moments]:
    """Mean and covariance of the keys of a forward, by layer, for ``AdaptiveHeads(moments=...)``.

    Args:
        inputs: one forward, of a text or of random tokens, as long as the texts to come: keys carry
            their rotary positions. sinks: first tokens left out.
    """
    from attnbias.hub import attach

    reader = _Keys(sinks)
    with evaluating(model), torch.no_grad(), attach(model, reader):
        model(**inputs)
    return reader.found


class _Keys:
    """A participant that keeps the moments of each layer's keys."""

    role = "see"

    def __init__(self, sinks: int) -> None:
        self.sinks, self.found = sinks, dict[int, Moments]()

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...

    def see(self, call: Any, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        if call.site.tower not in ("text", "decoder") or call.site.kind == "cross":
            return
        real = call.key_positions.expand(call.key.shape[0], -1) >= self.sinks
        keys = call.key.detach().double().movedim(1, 2)[real].movedim(1, 0)  # (groups, keys, dim)
        if keys.shape[1] < 2:
            raise AttnbiasError(
                f"moments_of needs a forward with at least {self.sinks + 2} tokens, {self.sinks} "
                "of which are left out as sinks."
            )
        mean = keys.mean(1, keepdim=True)
        spread = (keys - mean).mT @ (keys - mean) / keys.shape[1]
        self.found[call.site.layer] = Moments(mean[:, 0], spread)


def _share(local: Tensor, bulk: Tensor) -> Tensor:
    return local / (local + bulk)


def _long(share: Tensor, threshold: float) -> Tensor:
    return torch.where(share.isnan(), torch.nan, (share < threshold).double()).nanmean(-1)


def _padded(parts: list[Tensor]) -> Tensor:
    heads, queries = (max(part.shape[dim] for part in parts) for dim in (2, 3))
    wide = [
        nn.functional.pad(
            part, (0, queries - part.shape[3], 0, heads - part.shape[2]), value=torch.nan
        )
        for part in parts
    ]
    return torch.cat(wide)
