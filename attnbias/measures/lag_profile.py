"""Lag profiles: how far from the earlier copy of a token attention falls, and CMR distance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures.base import Data, HeadMeasure, bar, evaluating
from attnbias.measures.cmr import CMR
from attnbias.measures.probes import First, attention_at, drawer, text_tower
from attnbias.measures.scores import Scores, gather

_BATCH = 4


@dataclass(frozen=True)
class LagProfile(HeadMeasure):
    r"""Attention from the second copy of a list of random tokens to its first copy, by lag.

    .. math:: a_h(l) = \operatorname{mean}_i\; p^h_{L + i,\; i + l}

    over the tokens i of the list for which i + l is in it too: lag 0 is the earlier copy of the
    token itself, lag 1 the token that came after it. The score is the attention at lag 1 (the
    induction-matching score), or how like the profile is to that of the CMR model of recall.

    Args:
        score: "matching", or "cmr": the negative of the CMR distance (`CMR.distance`) of the mean
            profile, so that the most CMR-like heads are ``scores.top(k)``.
        length: tokens of the list. lags: on each side; published 5.
        count: lists. seed, tokens, first: see `InductionHeads`.
        model: the CMR grid; used for "cmr".

    Returns:
        `Scores`, with one sample a list ("cmr": one in all). details: ``"lags"``; ``"profile"``
        ``(layers, heads, lags)`` and ``"profile_error"``, its standard error over the lists;
        ``"distance"`` and ``"parameters"`` (beta_enc, beta_rec, gamma) for "cmr".

    Cost: a forward and O(tokens lags) a list; the CMR curves once.

    Raises:
        AttnbiasError: a bad field, a probe longer than the model reads, data.
        Refused: a model without one tower of text.

    Source: Linking In-context Learning in Transformers to Human Episodic Memory, 2024 (arXiv
    2405.14992); authors' code of the fit read. Left open there and chosen here: attention after the
    softmax, lists of 100 tokens, ten of them.
    """

    name: ClassVar[str] = "lag_profile"
    score: Literal["matching", "cmr"] = "matching"
    length: int = 100
    lags: int = 5
    count: int = 10
    seed: int = 0
    tokens: Sequence[int] | None = None
    first: First = "model"
    model: CMR = field(default_factory=CMR)

    def __post_init__(self) -> None:
        if self.score not in ("matching", "cmr"):
            raise AttnbiasError(f"score must be 'matching' or 'cmr', got {self.score!r}.")
        check(self, (("length", 2), ("lags", 1), ("count", 1)))
        if not self.lags <= min(8, self.length - 1):
            raise AttnbiasError(
                f"LagProfile(lags) must be at most 8 and below the length, got {self.lags}."
            )

    def probes(self, model: nn.Module) -> tuple[Tensor, int]:
        """The probes ``(count, tokens)``, and where their lists begin."""
        source = drawer(model, self.tokens, self.first, 1 + 2 * self.length, "LagProfile")
        return source.begun(source.lists(self.count, self.length, self.seed).repeat(1, 2)), (
            source.start
        )

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        if data is not None:
            raise AttnbiasError("LagProfile makes its own probes: leave data out.")
        tower = text_tower(model, "LagProfile")
        probes, start = self.probes(model)
        order = torch.arange(self.length).expand(self.count, -1)
        found = []
        steps = range(0, self.count, _BATCH)
        with evaluating(model), bar(len(steps), self.name, progress) as tick:
            for at in steps:
                rows = slice(at, at + _BATCH)
                targets = {"lag": lag_targets(order[rows], start, self.lags)}
                layers, shown, _ = attention_at(model, probes[rows], targets, tower)
                found.append(shown["lag"].nanmean(-2))
                tick()
        samples = _gathered(found)
        profile = samples.mean(0)
        details: dict[str, Any] = {
            "lags": list(range(-self.lags, self.lags + 1)),
            "profile": profile,
            "profile_error": samples.std(0) / self.count**0.5,
        }
        values = samples[..., self.lags + 1]
        if self.score == "cmr":
            details["distance"], details["parameters"] = self.model.distance(profile)
            values = -details["distance"][None]
        return Scores(self.name, tower, tuple(layers), values, details=details)


def lag_targets(order: Tensor, start: int, lags: int) -> Tensor:
    """For each query of a second list the keys of the first, by lag from the query's own token.

    Args:
        order: ``(batch, length)``: which token of the first list stands at each place of the
            second. start: the position of the first list's first token.

    Returns:
        ``(batch, start + 2 length, 2 lags + 1)`` key positions, -1 where there is no such token.
    """
    batch, length = order.shape
    at = order[..., None] + torch.arange(-lags, lags + 1)
    second = torch.where((at >= 0) & (at < length), at + start, -1)
    before = torch.full((batch, start + length, 2 * lags + 1), -1)
    return torch.cat([before, second], 1)


def check(measure: Any, fields: Sequence[tuple[str, int]]) -> None:
    """Raise where a field is no whole number from its least."""
    for word, least in fields:
        value = getattr(measure, word)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise AttnbiasError(
                f"{type(measure).__name__}({word}) must be a whole number from {least}, got "
                f"{value!r}."
            )


def _gathered(parts: list[Tensor]) -> Tensor:
    """Profiles ``(batch, layers, heads, lags)`` of several batches."""
    lags = [gather([part[..., n] for part in parts]) for n in range(parts[0].shape[-1])]
    return torch.stack(lags, -1)
