"""ACT: find the attention sinks beyond the first token, and give part of their attention back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.by_position import at_positions, to_positions, together
from attnbias.steer.rule import Rule
from attnbias.steer.site import SiteCall


@dataclass(frozen=True)
class Selected:
    """How heads were selected, for the record.

    Attributes:
        by: the score that had to rise. examples: how many were used.
        plain: accuracy and mean log-probability of the answers, of the plain model.
        together: the same with all kept heads calibrated at once.
        scores: (layer, head, accuracy, log-probability) with one head calibrated at a time.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - read by pydantic

    by: Literal["accuracy", "log_probability"]
    examples: int
    plain: tuple[float, float]
    together: tuple[float, float]
    scores: tuple[tuple[int, int, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class ACT(Rule):
    r"""Calibrate attention sinks: weaken them by a factor and spread what they lose.

    .. math:: S = \Big\{t : \frac{1}{n_t} \sum_i a_{it} > \theta\Big\} \setminus \{t_0\}, \quad
              a'_{it} = \beta a_{it}\ (t \in S), \quad
              a'_{ij} = a_{ij} \Big(1 + \frac{(1 - \beta) s_i}{1 - s_i}\Big)\ (j \notin S), \quad
              s_i = \sum_{t \in S} a_{it}

    with :math:`n_t` the rows that can see key t. Each head of each row of the batch has its own
    sinks. Rows that see nothing but sinks stay as they are.

    Args:
        beta: what is left of a sink's attention, in [0, 1]; 1 changes nothing.
        threshold: :math:`\theta`, a share of attention (0.1 in the authors' search and evaluation
            scripts, 0.15 in their script for dialogues).
        alpha: :math:`\theta = \alpha / T` instead, T tokens in the row (5 in a third party's
            account of the paper); None for the fixed threshold.
        spare: the sink that is left alone: ``"found"``, the first one found, as published, which
            is meant to be token 0 and is another one where a head does not attend to that; or
            ``"first"``, token 0 and no other.
        heads: those that `fit` selects on held-out examples. layers, towers, phase: see `Rule`.
        selected: the record of the selection, filled in by `fit`.

    When decoding, the sinks are those of the prompt: they are found at prefill, by its rows, and
    kept; later tokens are never sinks. (The authors' function takes the square map of a prompt for
    granted and would calibrate no step after it rightly.) Of a prefill in chunks each chunk has the
    sinks by the rows so far, and the steps those by all of them.

    Cost: three attention calls on the chosen heads more: received attention (once per prompt),
    shares, result; memory O(keys).

    Raises:
        AttnbiasError: beta outside [0, 1], a threshold or alpha that is not above 0.

    Source: Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
    Training through Attention Calibration, 2024 (arXiv 2406.15765); authors' code read. It departs
    where it must (steps of decoding) and may (`spare`). Which of the two thresholds gave the
    published tables is not known here.
    """

    beta: float = 0.4
    threshold: float = 0.1
    alpha: float | None = None
    spare: Literal["found", "first"] = "found"
    selected: Selected | None = None

    row_local: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (_finite(self.beta) and 0 <= self.beta <= 1):
            raise AttnbiasError(f"beta must be from 0 to 1, got {self.beta!r}.")
        for name, value in (("threshold", self.threshold), ("alpha", self.alpha)):
            if not (name == "alpha" and value is None) and not (_finite(value) and value > 0):  # type: ignore[operator]
                raise AttnbiasError(f"{name} must be a finite number above 0, got {value!r}.")
        if self.spare not in ("found", "first"):
            raise AttnbiasError(f"spare must be 'found' or 'first', got {self.spare!r}.")

    def acts_in(self, tower: str, layer: int, phase: str) -> bool:
        # The sinks are found in the prompt, also where only the steps after it are calibrated.
        return super().acts_in(tower, layer, self.phase if self.phase == "decode" else phase)

    def sinks(self, site: SiteCall) -> tuple[Tensor, Tensor, Tensor]:
        """The sinks of the prompt by its rows so far, by position: bool ``(batch, heads, N)``.

        With what was received at each position, and by how many rows it was seen.
        """
        places, before = site.key_positions, site.held("sinks")
        received = together(to_positions(site.received(), places), before and before[1])
        seen_by = site.seen_by().expand(site.shape[0], -1, -1)
        seen = together(to_positions(seen_by, places), before and before[2])
        tokens = (places.amax(-1) + 1)[:, None, None]
        limit = self.threshold if self.alpha is None else self.alpha / tokens
        found = received / seen.clamp(min=1) > limit
        others = found.cumsum(-1) > 1 if self.spare == "found" else torch.ones_like(found)
        others[..., :1] = False
        return found & others, received, seen

    def groups(self, site: SiteCall) -> Tensor:
        found = site.frozen("sinks", lambda: self.sinks(site))[0]
        return at_positions(found, site.key_positions).long()

    def group_count(self, site: SiteCall, groups: Tensor) -> int:
        return 2

    def reallocate(self, site: SiteCall, masses: Tensor) -> Tensor | None:
        if self.beta == 1 or self.phase not in ("both", site.phase):
            return None
        freed = torch.where(masses[..., 0] > 0, (1 - self.beta) * masses[..., 1], 0.0)
        return masses + torch.stack([freed, -freed], -1)

    def fit(
        self,
        model: nn.Module,
        examples: Sequence[Any],
        *,
        by: Literal["accuracy", "log_probability"] = "accuracy",
        progress: bool = True,
    ) -> ACT:
        """Keep the heads whose calibration alone raises the score on held-out examples.

        Args:
            model: in eval mode; it is left as it is.
            examples: `Example` records with answers. The authors take about 900 of each data set.
            by: ``"accuracy"`` as published; ``"log_probability"`` of the answers is finer where
                examples are few.
            progress: show a bar (needs rich; silent without it).

        Returns:
            The rule with `heads` as (layer, head) pairs and the record `selected`. Candidates are
            the heads and layers of this rule; with ``layers="all"`` the first two layers and the
            last are left out, as published (layers 2 to 30 of 32).

        Cost: (2 + candidates) forwards per example.

        Raises:
            AttnbiasError: no examples, answers that are missing, a model in training mode, no head
                that raises the score.
        """
        from attnbias.steer.selection import select

        return select(self, model, examples, by, progress)

    def calibrating(self, layer: int, head: int) -> ACT:
        """The same rule on one head alone."""
        return replace(self, heads=((layer, head),), layers="all", selected=None)


def _finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)  # type: ignore[arg-type]
