"""Focus directions: a learned direction per head moves attention from the sink to what matters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.hooks import Vectors
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall


@dataclass(frozen=True)
class FocusExample:
    """One prompt with its answer, for `FocusDirections.fit`.

    Args:
        inputs: the model's inputs for one row: prompt and answer.
        relevant: ``(start, stop)``, the token positions of the passage that holds the answer.
        response: ``(start, stop)``, the token positions of the answer.
    """

    inputs: Mapping[str, Any]
    relevant: tuple[int, int]
    response: tuple[int, int]


@dataclass(frozen=True)
class FocusFit:
    """How the directions were found, for the record.

    Attributes:
        examples, epochs, rate, seed: what `fit` was given.
        scores: for each head of the rule, the mean share of attention that the answer's tokens gave
            to the relevant passage.
        before, after: the mean of that share over heads and examples without a direction and with
            the whole direction (strength 1).
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    examples: int
    epochs: int
    rate: float
    seed: int
    scores: tuple[float, ...]
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class FocusDirections(Rule):
    r"""Add a learned direction to the queries of a few heads that look for the relevant context.

    .. math:: q_i \leftarrow q_i + \alpha\, d^{(h)} \quad\text{so that}\quad
              B_{ij} = \alpha\, s\, d^{(h)} \cdot k_j

    with s the scale of the scores: keys that agree with the direction gain, in every row alike.

    Args:
        alpha: the strength; 0.2 as published (0.3 in one evaluation); below 0 turns it round.
        heads: pairs ``(layer, head)``, as `fit` gives them; to `fit`, the candidates.
        directions: one vector for each pair, in their order; filled in by `fit`.
        fitted: the record of the fit, filled in by `fit`.
        layers, towers, phase: see `Rule`.

    Cost: one attention call on the chosen heads, with nothing added to it.

    Raises:
        AttnbiasError: as many directions as pairs of heads are needed, each as long as a head.
        Refused: steering with an unfitted rule.

    Source: Focus Directions Make Your Language Models Pay More Attention to Relevant Contexts, 2025
    (arXiv 2503.23306); authors' code read. Departs: the work also learns a direction that is added
    to every key. It shifts a whole row of scores by one number, so softmax cancels it and its
    gradient is zero: it is left out. The later version's control of the strength is not published
    and not here. Directions are added after the rotary embedding, as in the released code.
    """

    alpha: float = 0.2
    directions: tuple[tuple[float, ...], ...] = ()
    fitted: FocusFit | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.alpha, bool) or not math.isfinite(self.alpha):
            raise AttnbiasError(f"alpha must be a finite number, got {self.alpha!r}.")
        vectors = tuple(tuple(float(x) for x in vector) for vector in self.directions)
        object.__setattr__(self, "directions", vectors)
        pairs = [] if self.heads == "all" else [h for h in self.heads if isinstance(h, tuple)]
        if vectors and len(pairs) != len(vectors):
            raise AttnbiasError(
                f"directions must hold one vector for each pair (layer, head) of heads, got "
                f"{len(vectors)} vectors and {len(pairs)} pairs."
            )

    def ready(self) -> None:
        if not self.directions:
            raise Refused(
                "FocusDirections has no directions yet: run rule = "
                "FocusDirections(heads='all').fit(model, examples)."
            )

    def vectors(self, site: SiteCall) -> Vectors | None:
        self.ready()
        if self.alpha == 0:
            return None
        own = dict(zip(self.heads, self.directions, strict=True))
        chosen = [own[(site.site.layer, head)] for head in site.heads]
        query = site.query
        if len(chosen[0]) != query.shape[-1]:
            raise AttnbiasError(
                f"directions must have {query.shape[-1]} entries at {site.site}, got "
                f"{len(chosen[0])}."
            )
        moved = torch.tensor(chosen, dtype=site.dtype, device=site.device)[None, :, None]
        return Vectors(query=query.to(site.dtype) + self.alpha * moved)

    def fit(
        self,
        model: nn.Module,
        examples: Sequence[FocusExample],
        *,
        top: int = 20,
        epochs: int = 10,
        rate: float = 1e-3,
        seed: int = 0,
        progress: bool = True,
    ) -> FocusDirections:
        r"""Choose the heads that look at the relevant passage, and learn their directions.

        A head's score is the share of attention that the answer's tokens give to the passage, the
        mean over tokens and examples. Directions start at N(0, 0.01) and maximise that share,

        .. math:: \max_d \ \frac{1}{R}\sum_{i \in \text{answer}} \sum_{j \in \text{passage}}
                  \mathrm{softmax}_j(s\,(q_i + d) \cdot k_j)

        on the plain model's queries and keys, example by example, by AdamW: no gradient runs
        through the model, and heads do not touch each other.

        Args:
            examples: `FocusExample` records of one row each.
            top: how many heads; 20 as published. epochs: 10 as published. rate: 1e-3 as published.
            progress: show a bar (needs rich; silent without it).

        Cost: two forwards per example, and ``epochs * examples`` maps of ``top`` heads by the
        answer's rows.

        Raises:
            AttnbiasError: no examples, spans that are empty, a model in training mode.
        """
        from attnbias.steer.focusing import learn

        return learn(self, model, examples, top, epochs, rate, seed, progress)
