"""The in-context-learning score, and what each head adds to it with all patterns held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.hub.sites import sites
from attnbias.measures.base import Data, HeadMeasure, Measure, bar, evaluating, forwards
from attnbias.measures.probes import next_losses, text_tower
from attnbias.measures.scores import Head, Scores, gather
from attnbias.measures.texts import check_pairs
from attnbias.steer.hooks import Vectors
from attnbias.steer.rule import Heads, Rule
from attnbias.steer.site import SiteCall


@dataclass(frozen=True, kw_only=True)
class _Held(Rule):
    """Keeps the queries and keys of one forward, and puts them into the next: patterns held."""

    heads: Heads = "all"
    found: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    holds: bool = False

    def look(self, site: SiteCall) -> bool:
        if not self.holds:
            self.found[site.site] = (site.query, site.key)
        return True

    def vectors(self, site: SiteCall) -> Vectors | None:
        if not self.holds:
            return None
        query, key = self.found[site.site]
        return Vectors(query=query, key=key)


@dataclass(frozen=True)
class InContext:
    """The loss of every token by its place in the text, and the score made of it.

    Attributes:
        losses: ``(rows, tokens)`` float64, ``-ln p`` of the token at each place counted from 0 (its
            own row's first real token); NaN at 0 and after the end.
        samples: ``(rows,)``: loss at `late` less loss at `early`; NaN for a row that is too short.
    """

    losses: Tensor
    samples: Tensor
    early: int
    late: int

    @property
    def score(self) -> float:
        """The mean over the rows, in nats: negative where a text is easier later on."""
        return float(self.samples.nanmean())

    @property
    def error(self) -> float:
        """Standard error of `score`."""
        known = self.samples[~self.samples.isnan()]
        return float(known.std() / len(known) ** 0.5)


@dataclass(frozen=True)
class InContextScore(Measure):
    r"""How much easier a text is late than early, with or without some heads.

    .. math:: \mathrm{ICL} = \operatorname{mean}_{\text{rows}}
        \left(\ell_{\text{late}} - \ell_{\text{early}}\right), \qquad
        \ell_i = -\ln p(x_i \mid x_{<i})

    Args:
        early, late: places in the text, counted from 0. Published 50 and 500.
        heads: pairs (layer, head) whose output is set to zero.
        patterns: "held": every head attends as in the plain model, so that only what heads write
            is missing (the work's pattern-preserving ablation); "free": attention follows the
            changed hidden states, a plain ablation.

    Data: forwards of a decoder, padded on any side.

    Returns:
        `InContext`.

    Cost: one forward for each of `data`, two with `heads` and patterns held: the queries and keys
    of the first are kept, O(tokens) memory, no map.

    Raises:
        AttnbiasError: places in the wrong order, data that reach `late` in no row.
        Refused: a model without one tower of text.

    Source: In-context Learning and Induction Heads, 2022 (arXiv 2209.11895); equations read.
    """

    name: ClassVar[str] = "in_context_score"
    early: int = 50
    late: int = 500
    heads: Sequence[Head] = ()
    patterns: Literal["held", "free"] = "held"

    def __post_init__(self) -> None:
        _places(self.early, self.late)
        object.__setattr__(self, "heads", check_pairs(self.heads, "heads"))
        if self.patterns not in ("held", "free"):
            raise AttnbiasError(f"patterns must be 'held' or 'free', got {self.patterns!r}.")

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> InContext:
        given = forwards(data, "InContextScore")
        tower = text_tower(model, "InContextScore")
        parts = []
        with evaluating(model), torch.no_grad(), bar(len(given), self.name, progress) as tick:
            for inputs in given:
                held = _keep(model, inputs, tower) if self._holds else None
                parts.append(_ablated(model, inputs, tower, self.heads, held))
                tick()
        losses = _joined(parts)
        return InContext(losses, _score(losses, self.early, self.late), self.early, self.late)

    @property
    def _holds(self) -> bool:
        return bool(self.heads) and self.patterns == "held"


@dataclass(frozen=True)
class InContextAblation(HeadMeasure):
    r"""What each head adds to in-context learning: the score without it less the plain score.

    .. math:: \Delta_h = \mathrm{ICL}(\text{without } h) - \mathrm{ICL}

    in nats, positive for a head that in-context learning leans on. Samples are rows.

    Args:
        early, late, patterns: see `InContextScore`.

    Data, Raises: as `InContextScore`.

    Returns:
        `Scores`; details: ``"plain"``, the `InContext` of the whole model.

    Cost: as many forwards of `data` as there are heads, and one or two more.

    Source: In-context Learning and Induction Heads, 2022 (arXiv 2209.11895); equations read.
    """

    name: ClassVar[str] = "in_context_ablation"
    early: int = 50
    late: int = 500
    patterns: Literal["held", "free"] = "held"

    def __post_init__(self) -> None:
        InContextScore(self.early, self.late, (), self.patterns)

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given = forwards(data, "InContextAblation")
        tower = text_tower(model, "InContextAblation")
        parts, plain, numbers = [], [], []
        with evaluating(model), torch.no_grad():
            counts = _head_counts(model, given[0], tower)
            numbers = sorted(counts)
            with bar(len(given) * sum(counts.values()), self.name, progress) as tick:
                for inputs in given:
                    held = _keep(model, inputs, tower) if self.patterns == "held" else None
                    whole = _ablated(model, inputs, tower, (), None)
                    base = _score(whole, self.early, self.late)
                    found = torch.full(
                        (len(whole), len(numbers), max(counts.values())), torch.nan
                    ).double()
                    for row, layer in enumerate(numbers):
                        for head in range(counts[layer]):
                            lost = _ablated(model, inputs, tower, ((layer, head),), held)
                            found[:, row, head] = _score(lost, self.early, self.late) - base
                            tick()
                    parts.append(found)
                    plain.append(whole)
        losses = _joined(plain)
        kept = InContext(losses, _score(losses, self.early, self.late), self.early, self.late)
        return Scores(self.name, tower, tuple(numbers), gather(parts), details={"plain": kept})


def _places(early: object, late: object) -> None:
    good = all(isinstance(n, int) and not isinstance(n, bool) for n in (early, late))
    if not good or not 0 < early < late:  # type: ignore[operator]
        raise AttnbiasError(
            f"early and late must be whole numbers with 0 < early < late, got {early!r}, {late!r}."
        )


def _keep(model: nn.Module, inputs: Mapping[str, Any], tower: str) -> _Held:
    from attnbias.steer.context import steer

    keep = _Held(towers=(tower,))
    with steer(model, keep):
        model(**inputs)
    return _Held(towers=(tower,), found=keep.found, holds=True)


def _ablated(
    model: nn.Module,
    inputs: Mapping[str, Any],
    tower: str,
    heads: Sequence[Head],
    held: _Held | None,
) -> Tensor:
    """The loss of every token without some heads."""
    from attnbias.steer.context import steer
    from attnbias.steer.rules.block_heads import BlockHeads

    rules: list[Rule] = [] if held is None else [held]
    if heads:
        rules.append(BlockHeads(heads=tuple(heads), towers=(tower,)))
    if rules:
        with steer(model, *rules):
            out = model(**inputs)
    else:
        out = model(**inputs)
    logits = getattr(out, "logits", None)
    if logits is None or logits.ndim != 3:
        raise AttnbiasError("the in-context score needs a model with next-token scores.")
    return next_losses(logits, inputs["input_ids"], inputs.get("attention_mask"))


def _head_counts(model: nn.Module, inputs: Mapping[str, Any], tower: str) -> dict[int, int]:
    from attnbias.observe import observe, statistics

    with observe(model, [statistics.FirstToken()]) as seen:
        model(**inputs)
    sizes = {site: runs[-1].size()["heads"] for site, runs in seen._runs.items()}
    return {site.layer: sizes[site] for site in sites(model) if site.tower == tower}


def _score(losses: Tensor, early: int, late: int) -> Tensor:
    if losses.shape[1] <= late or bool(losses[:, late].isnan().all()):
        raise AttnbiasError(
            f"the in-context score reads the token at place {late}, and no row has as many "
            f"tokens; give longer texts or a smaller late."
        )
    return losses[:, late] - losses[:, early]


def _joined(parts: list[Tensor]) -> Tensor:
    longest = max(part.shape[1] for part in parts)
    padded = [
        nn.functional.pad(part, (0, longest - part.shape[1]), value=torch.nan) for part in parts
    ]
    return torch.cat(padded)
