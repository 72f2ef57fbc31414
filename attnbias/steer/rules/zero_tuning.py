"""ZeroTuning: one factor on the attention that the first token gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from attnbias.bias import Bias, KeyBias
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import FIRST

# A third party's sweep; the paper publishes no grid.
GRID = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)
PROFILE = (0.5, 2.0)  # down, up


@dataclass(frozen=True)
class Fitted:
    """How a factor was found, for the record.

    Attributes:
        by: ``"accuracy"`` or ``"entropy"``. examples: how many were used.
        down, up: the two groups of head numbers that profiling gave.
        profile: the two factors heads were profiled with.
        factors, scores: the grid that was searched and its scores (accuracy with the mean
            log-probability of the answer, or the negative mean output entropy in nats).
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    by: Literal["accuracy", "entropy"]
    examples: int
    down: tuple[int, ...]
    up: tuple[int, ...]
    profile: tuple[float, float]
    factors: tuple[float, ...]
    scores: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class ZeroTuning(Rule):
    r"""Scale the attention on token 0 (BOS) of the chosen heads, and normalise each row again.

    .. math:: a_0' = \frac{g\, a_0}{D}, \quad a_i' = \frac{a_i}{D}, \quad D = 1 + (g - 1)\, a_0

    which is ``log(g)`` on the logit of key 0. Ratios among the other tokens stay; g > 1 flattens
    their differences, g < 1 sharpens them.

    Args:
        factor: g > 0; 1 changes nothing; None until it is found by `fit`.
        heads, layers, towers, phase: see `Rule`. Token 0 is the first real token of a row.
        fitted: the record of the fit, filled in by `fit`.

    Cost: as `KeyShift`: one attention call on the chosen heads.

    Raises:
        Refused: steering with an unfitted rule.

    Source: ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models
    Without Training, 2025 (arXiv 2505.11739). Left open there and chosen here: the values of the
    grid (a third party's sweep, 0.25 to 10), the two factors of the profile (0.5 and 2), ties
    between scores (the mean log-probability of the answer), and what to do when no head alone
    moves the score (the factor is then searched on all candidates). Published advice: 40 to 70 % of
    the heads and the layers of the first two thirds; classification tends to g > 1, questions and
    answers to g < 1.
    """

    layers_alike: ClassVar[bool] = True
    factor: float | None = None
    fitted: Fitted | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor is not None and not is_factor(self.factor):
            raise AttnbiasError(f"factor must be a finite number above 0, got {self.factor!r}.")

    def ready(self) -> None:
        if self.factor is None:
            raise Refused(
                "ZeroTuning has no factor yet: write ZeroTuning(factor=..., heads=...), or run "
                "rule = ZeroTuning(heads=...).fit(model, examples)."
            )

    def bias(self, site: SiteCall) -> Bias | None:
        self.ready()
        assert self.factor is not None
        if self.factor == 1:
            return None
        first = site.where((FIRST,))
        weight = torch.zeros(first.shape, dtype=site.dtype, device=first.device)
        return KeyBias(weight.masked_fill(first, math.log(self.factor))[:, None])

    def fit(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        by: Literal["accuracy", "entropy"] = "accuracy",
        grid: Sequence[float] = GRID,
        profile: tuple[float, float] = PROFILE,
        progress: bool = True,
    ) -> ZeroTuning:
        """Find heads and factor on examples; the rule that is returned is ready.

        Each candidate head number, over all layers of the rule, is scaled down and up alone: heads
        that score better than the plain model fall into two groups. The larger group (ties: the
        larger gain) is kept, and its factor is the best of the grid on its own side of 1, the plain
        model included: on these examples the result is never worse than the plain model.

        Args:
            model: in eval mode; it is left as it is.
            examples: `Example` records (one prompt each). Without labels (``by="entropy"``) a
                mapping of model inputs will do.
            by: ``"accuracy"`` of the next token (or class), or lowest output ``"entropy"``.
            grid: the factors to try. profile: the two factors to profile with, down and up.
            progress: show a bar (needs rich; silent without it).

        Cost: (2 heads + grid) forwards per example.

        Raises:
            AttnbiasError: no examples, a bad grid or profile, heads given as pairs, a model in
                training mode, labels that are missing.
        """
        from attnbias.steer.fitting import search

        return search(self, model, examples, by, grid, profile, progress)


@dataclass(frozen=True)
class Example:
    """One prompt with its answer, for `ZeroTuning.fit`.

    Args:
        inputs: the model's inputs for one row.
        answer: the token that should come next (or the class, for a classifier); None unlabelled.
        choices: the tokens (classes) to choose among; empty for all.
    """

    inputs: Mapping[str, Any]
    answer: int | None = None
    choices: tuple[int, ...] = ()


def is_factor(value: object) -> bool:
    """A finite number above 0 (True is not a number here)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value > 0  # type: ignore[arg-type, operator]
