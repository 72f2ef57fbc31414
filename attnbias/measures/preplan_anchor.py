"""PreplanAnchor: where a model plans a stretch of its answer, and which tokens it keeps going back
to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, Measure, bar, evaluating, forwards
from attnbias.measures.scores import Head
from attnbias.measures.texts import text_rows

RESPONSE = "response"
Credit = Literal["preplan", "anchor", "coupled"]


@dataclass(frozen=True)
class Rhythm:
    r"""The two signals of one response, token by token.

    Attributes:
        waad: ``(tokens,)`` windowed average attention distance of each response token, averaged
            over the local heads.
        fai: ``(tokens,)`` future attention influence, averaged over the global heads; NaN for the
            tokens that nothing follows far enough.
        local, globals: the heads of both groups, ``(layer, head)``.
    """

    waad: Tensor
    fai: Tensor
    local: tuple[Head, ...]
    globals: tuple[Head, ...]

    @property
    def steps(self) -> Tensor:
        r"""``(tokens,)``, last NaN: :math:`D_t = |\mathrm{WAAD}_t - \mathrm{WAAD}_{t+1}|`."""
        found = torch.full_like(self.waad, torch.nan)
        found[:-1] = (self.waad[:-1] - self.waad[1:]).abs()
        return found

    def preplan(self, share: float = 0.4) -> Tensor:
        """The tokens of the largest steps, booleans ``(tokens,)``; 0.4 as published."""
        return _largest(self.steps, share)

    def anchors(self, share: float = 0.4) -> Tensor:
        """The tokens of the largest influence, booleans ``(tokens,)``; 0.4 as published."""
        return _largest(self.fai, share)

    def dominated(self, share: float = 0.4, back: int = 3) -> tuple[Tensor, Tensor]:
        """Anchors that a preplan token introduces, and the token that introduces each.

        An anchor counts when its WAAD is at most the median and the largest step of the `back`
        tokens before it is at least the median step; that token introduces it.

        Returns:
            Booleans ``(tokens,)``, and the numbers of the tokens that introduce, -1 elsewhere.
        """
        low = self.waad <= self.waad.median()
        steps = self.steps.nan_to_num(-1.0)
        middle = self.steps.nanmedian()
        found = torch.zeros_like(low)
        source = torch.full_like(self.waad, -1, dtype=torch.long)
        for token in self.anchors(share).nonzero()[:, 0].tolist():
            first = max(0, token - back)
            if token == first or not bool(low[token]):
                continue
            best = first + int(steps[first:token].argmax())
            if bool(steps[best] >= middle):
                found[token], source[token] = True, best
        return found, source

    def factors(
        self,
        credit: Credit = "coupled",
        *,
        share: float = 0.4,
        gain: float = 1.5,
        moved: float = 0.5,
        back: int = 3,
    ) -> Tensor:
        r"""What multiplies each token's advantage, ``(tokens,)``.

        .. math:: \gamma_t = 1 + (g - 1)\bigl(\mathbb 1[\text{plain anchor}] +
            (1 - a)\,\mathbb 1[\text{dominated anchor}] + a\,\mathbb 1[\text{introduces one}]\bigr)

        for "coupled"; :math:`1 + (g - 1) \mathbb 1[\text{chosen}]` for "preplan" and "anchor".

        Args:
            share: of the tokens that are chosen; 0.4 as published. gain: g, 1.5 as published.
            moved: a, from 0 (credit of anchors alone) to 1. back: tokens before an anchor, 1 to 3.
        """
        if credit not in ("preplan", "anchor", "coupled"):
            raise AttnbiasError(f"credit must be 'preplan', 'anchor' or 'coupled', got {credit!r}.")
        if not 0 <= moved <= 1:
            raise AttnbiasError(f"moved must be from 0 to 1, got {moved!r}.")
        if credit == "preplan":
            return 1 + (gain - 1) * self.preplan(share).double()
        weight = self.anchors(share).double()
        if credit == "coupled":
            dominated, source = self.dominated(share, back)
            weight[dominated] = 1 - moved
            introduces = torch.zeros_like(weight)
            introduces[source[dominated]] = moved
            weight = weight + introduces
        return 1 + (gain - 1) * weight

    def scaled(self, advantages: Tensor, credit: Credit = "coupled", **options: Any) -> Tensor:
        """Advantages ``(tokens,)`` with this credit; those below 0 stay as they are."""
        if advantages.shape != self.waad.shape:
            raise AttnbiasError(
                f"advantages must be one for each of the {len(self.waad)} response tokens, got "
                f"shape {tuple(advantages.shape)}."
            )
        gamma = self.factors(credit, **options).to(advantages)
        return torch.where(advantages >= 0, advantages * gamma, advantages)


@dataclass(frozen=True)
class PreplanAnchor(Measure):
    r"""The preplan-and-anchor rhythm of responses: two signals from two groups of heads.

    .. math:: d_h = \operatorname{mean}_t \sum_s A^h_{ts} (t - s), \qquad
        \mathrm{WAAD}_t = \sum_s A^{\text{loc}}_{ts} \min(t - s, W), \qquad
        \mathrm{FAI}_s = \operatorname{mean}_{t \in [s + \text{low},\, s + \text{high}]}
        A^{\text{glob}}_{ts}

    Of the heads of a few middle layers, those with the smallest span d over the response's rows are
    local, those with the largest global; A is the mean map of a group. Preplan tokens are where
    WAAD changes most, anchors where FAI is largest.

    Data: forwards of prompt and response with one more entry ``"response"``: where the response
    starts, a whole number or one for each row. Rows run one by one, without padding.

    Args:
        layers: their numbers; None: `depth` of them, spread evenly from a third to two thirds of
            the model, as published. depth: 5 as published (fewer in a model that has fewer there).
        group: share of the heads that are local, and that are global; 0.3 as published.
        window: W; 10 as published. low, high: 10 and 50 as published for training; high None: to
            the end of the response, as in the analysis.

    Returns:
        A list of `Rhythm`, one for each row.

    Cost: one forward for each row, with the statistics `Distance`, `WindowedDistance` and
    `FutureInfluence` at the layers.

    Raises:
        AttnbiasError: a forward without a response, a response of less than two tokens.

    Source: Attention Illuminates LLM Reasoning: The Preplan-and-Anchor Rhythm Enables Fine-Grained
    Policy Optimization, 2025 (arXiv 2510.13554); equations read. The training is not here, only its
    signals and factors. Left open by the paper and chosen here as in a public plan: the thresholds
    of a dominated anchor (medians of WAAD and of its steps), a = 0.5, three tokens back. Only
    advantages from 0 up are scaled.
    """

    name: ClassVar[str] = "preplan_anchor"
    layers: tuple[int, ...] | None = None
    depth: int = 5
    group: float = 0.3
    window: int = 10
    low: int = 10
    high: int | None = 50

    def __post_init__(self) -> None:
        if not isinstance(self.depth, int) or isinstance(self.depth, bool) or self.depth < 1:
            raise AttnbiasError(f"depth must be a whole number from 1, got {self.depth!r}.")
        if not 0 < self.group <= 0.5:
            raise AttnbiasError(f"group must be above 0 and at most 0.5, got {self.group!r}.")
        self._statistics()

    def _statistics(self) -> list[Any]:
        from attnbias.observe import statistics

        influence = statistics.FutureInfluence(self.low, self.high)
        return [statistics.Distance(), statistics.WindowedDistance(self.window), influence]

    def middle(self, count: int) -> tuple[int, ...]:
        """The layers looked at in a model of `count` layers."""
        if self.layers is not None:
            return self.layers
        first, last = math.ceil(count / 3), max(math.ceil(count / 3), math.floor(2 * count / 3))
        first, last = min(first, count - 1), min(last, count - 1)
        steps = min(self.depth, last - first + 1)
        spread = torch.linspace(first, last, steps)
        return tuple(sorted({round(float(n)) for n in spread}))

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> list[Rhythm]:
        from attnbias.hub import sites
        from attnbias.steer.rules.block_heads import BlockHeads
        from attnbias.steer.states import tower_of

        given = forwards(data, "PreplanAnchor")
        rows = [row for forward in given for row in _responses(forward)]
        tower = tower_of(BlockHeads(heads="all", mode=None), model, prefer="text")
        layers = self.middle(sum(site.tower == tower for site in sites(model)))
        found = []
        with evaluating(model), torch.no_grad(), bar(len(rows), self.name, progress) as tick:
            for row, start in rows:
                found.append(self._rhythm(model, row, start, tower, layers))
                tick()
        return found

    def _rhythm(
        self,
        model: nn.Module,
        row: Mapping[str, Any],
        start: int,
        tower: str,
        layers: tuple[int, ...],
    ) -> Rhythm:
        from attnbias.observe import observe

        chosen = self._statistics()
        with observe(model, chosen, layers={tower: layers}) as seen:
            model(**row)
        span, waad, fai = (
            seen.tensor(s.label, tower).values[0, :, 0, :, start:].flatten(0, 1) for s in chosen
        )  # (layers * heads, tokens)
        width = seen.tensor(chosen[0].label, tower).values.shape[3]
        order = span.mean(-1).argsort(stable=True)
        order = order[: int((~span[:, 0].isnan()).sum())]  # heads that a layer does not have
        size = max(1, round(self.group * len(order)))
        groups = [order[:size], order[-size:]]
        names = [
            tuple(sorted((layers[n // width], n % width) for n in part.tolist())) for part in groups
        ]
        return Rhythm(waad[groups[0]].mean(0), fai[groups[1]].mean(0), names[0], names[1])


def _largest(values: Tensor, share: float) -> Tensor:
    """The largest share of the numbers that there are, at least one; the first of equals."""
    if not 0 < share <= 1:
        raise AttnbiasError(f"share must be above 0 and at most 1, got {share!r}.")
    known = ~values.isnan()
    found = torch.zeros_like(known)
    size = int(known.sum())
    if size:
        order = values.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        found[order[: max(1, round(share * size))]] = True
    return found


def _responses(forward: Mapping[str, Any]) -> list[tuple[dict[str, Any], int]]:
    """Rows of a forward without padding, each with the start of its response."""
    if RESPONSE not in forward:
        raise AttnbiasError(
            "PreplanAnchor needs forwards with the start of the response: {'input_ids': ..., "
            "'response': 12}."
        )
    plain = {word: value for word, value in forward.items() if word != RESPONSE}
    rows = text_rows(plain, "PreplanAnchor")
    given = forward[RESPONSE]
    starts = [given] * len(rows) if isinstance(given, int) else [int(n) for n in given]
    if len(starts) != len(rows):
        raise AttnbiasError(f"{len(rows)} rows need as many responses, got {len(starts)}.")
    for row, start in zip(rows, starts, strict=True):
        length = row["input_ids"].shape[1]
        if not 0 <= start <= length - 2:
            raise AttnbiasError(
                f"a response must leave at least two of the row's {length} tokens, got start "
                f"{start}."
            )
    return list(zip(rows, starts, strict=True))
