"""PASTA: tell a model where to look by weakening the attention on everything else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from attnbias.bias import Bias, KeyBias
from attnbias.errors import AttnbiasError
from attnbias.steer.rule import Rule
from attnbias.steer.rules.zero_tuning import is_factor
from attnbias.steer.site import SiteCall
from attnbias.steer.spans import Keys, keys_of

GENERATED = "generated"


@dataclass(frozen=True, kw_only=True)
class PASTA(Rule):
    r"""Multiply the attention on all tokens outside the emphasised ones by a factor, and normalise.

    .. math:: H_{ij} = \frac{1}{C_i}\begin{cases} A_{ij} & j \in G\\ \alpha\, A_{ij} & j \notin G
              \end{cases} \quad\text{that is}\quad B_{ij} = \log\alpha\,[j \notin G]

    Args:
        keys: the emphasised tokens G: names of spans, positions, ranges, or a list of these (one
            entry for each section).
        alpha: the factor, above 0; 0.01 as published; 1 changes nothing.
        side: ``"exclude"`` (published) weakens the tokens outside G; ``"include"`` multiplies those
            in G (alpha above 1 strengthens them).
        scope: ``"prompt"`` (as released) leaves generated tokens their weight and needs the span
            "generated", whose start says where the prompt ends; ``"all"`` is the equation as
            printed: every token outside G, so also what the model has written.
        sections: ``"union"``: G is all sections together, the equation. ``"summed"``: as released,
            where every section adds its own edit: with K sections a token outside all of them is
            weakened by ``alpha ** K`` and a token of one section by ``alpha ** (K - 1)``, so the
            prompt fades against what was written as sections are added.
        heads: the published heads are found by profiling (each head steered alone on some hundred
            examples of several tasks, the best 300 to 500 of each task intersected). layers,
            towers, phase: see `Rule`.

    Cost: one attention call on the chosen heads; memory O(keys).

    Raises:
        AttnbiasError: a factor that is not above 0, an unknown side, scope or sections.

    Source: Tell Your Model Where to Attend: Post-hoc Attention Steering for LLMs, 2023 (arXiv
    2311.02262); authors' code read. Departs: the released "include" with several sections also
    takes ``log(alpha)`` off the whole prompt, which only moves prompt against written tokens; it is
    kept under ``sections="summed"``. The profile of heads is not part of the rule.
    """

    layers_alike: ClassVar[bool] = True
    keys: Keys
    alpha: float = 0.01
    side: Literal["exclude", "include"] = "exclude"
    scope: Literal["prompt", "all"] = "prompt"
    sections: Literal["union", "summed"] = "union"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "keys", keys_of(self.keys))
        if not is_factor(self.alpha):
            raise AttnbiasError(f"alpha must be a finite number above 0, got {self.alpha!r}.")
        for name, known in (
            ("side", ("exclude", "include")),
            ("scope", ("prompt", "all")),
            ("sections", ("union", "summed")),
        ):
            if getattr(self, name) not in known:
                raise AttnbiasError(
                    f"{name} must be {known[0]!r} or {known[1]!r}, got {getattr(self, name)!r}."
                )

    @property
    def needs(self) -> tuple[str, ...]:
        named = tuple(key for key in self.keys if isinstance(key, str))
        # Without an edit outside G nothing depends on where the prompt ends.
        return named if self._everywhere else (*named, GENERATED)

    @property
    def _everywhere(self) -> bool:
        inside = self.side == "include" and self.sections == "union"
        return self.scope == "all" or inside

    def bias(self, site: SiteCall) -> Bias | None:
        if self.alpha == 1:
            return None
        if self.sections == "union":
            count = site.where(self.keys).long()
            total = 1
        else:
            count = torch.stack([site.where((key,)).long() for key in self.keys]).sum(0)
            total = len(self.keys)
        if self.side == "exclude":
            times = total - count
        else:
            times = count - (1 if self.sections == "summed" else 0)
        times = times.masked_fill(site.key_positions < 0, 0)
        if not self._everywhere:
            times = times.masked_fill(site.where((GENERATED,)), 0)
        return KeyBias((times.to(site.dtype) * math.log(self.alpha))[:, None])
