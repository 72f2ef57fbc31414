"""The search behind `ZeroTuning.fit`: profile the heads, then search one factor for a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.context import check_places
from attnbias.steer.rules.zero_tuning import Example, Fitted, ZeroTuning, is_factor
from attnbias.steer.scoring import Score, bar, examples_of
from attnbias.steer.scoring import score as scored

if TYPE_CHECKING:
    from attnbias.hub import Call

Scorer = Callable[[ZeroTuning], Score]


def search(
    rule: ZeroTuning,
    model: nn.Module,
    examples: Sequence[Any],
    by: Literal["accuracy", "entropy"],
    grid: Sequence[float],
    profile: Sequence[float],
    progress: bool,
) -> ZeroTuning:
    """See `ZeroTuning.fit`."""
    kept = examples_of(examples, by)
    _check(rule, model, by, grid, profile)
    candidates = _candidates(rule, model, kept[0])
    base = replace(rule, heads=candidates, factor=1.0, fitted=None)
    steps = 1 + 2 * len(candidates) + len(grid)
    with bar(steps, progress, "ZeroTuning") as tick:

        def score(trial: ZeroTuning) -> Score:
            found = scored(trial, model, kept, by)
            tick()
            return found

        plain = score(base)
        down, up, heads, side = _profile(base, candidates, profile, plain, score)
        factors = [1.0] + [float(f) for f in grid if f != 1 and side(float(f))]
        scores = [plain] + [score(replace(base, heads=heads, factor=f)) for f in factors[1:]]
    best = max(range(len(factors)), key=lambda i: scores[i])  # the first of equals: the plain model
    fitted = Fitted(
        by=by,
        examples=len(kept),
        down=down,
        up=up,
        profile=(float(profile[0]), float(profile[1])),
        factors=tuple(factors),
        scores=tuple(scores),
    )
    return replace(base, heads=heads, factor=factors[best], fitted=fitted)


def _profile(
    base: ZeroTuning,
    candidates: tuple[int, ...],
    profile: Sequence[float],
    plain: Score,
    score: Scorer,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], Callable[[float], bool]]:
    """The down- and up-effective heads, the heads to keep, and the side of 1 to search."""
    down: list[int] = []
    up: list[int] = []
    gain = {"down": 0.0, "up": 0.0}
    for head in candidates:
        low, high = (score(replace(base, heads=(head,), factor=float(f))) for f in profile)
        if high > plain and high >= low:
            up.append(head)
            gain["up"] += sum(high) - sum(plain)
        elif low > plain:
            down.append(head)
            gain["down"] += sum(low) - sum(plain)
    if not down and not up:
        return (), (), candidates, lambda f: True
    rising = (len(up), gain["up"]) >= (len(down), gain["down"])
    heads = tuple(up if rising else down)
    return tuple(down), tuple(up), heads, (lambda f: f > 1) if rising else (lambda f: f < 1)


def _check(
    rule: ZeroTuning, model: nn.Module, by: str, grid: Sequence[float], profile: Sequence[float]
) -> None:
    from attnbias.hub import sites

    if not grid or not all(map(is_factor, grid)):
        raise AttnbiasError(f"grid must hold factors above 0, got {grid!r}.")
    good = len(profile) == 2 and all(map(is_factor, profile)) and profile[0] < 1 < profile[1]
    if not good:
        raise AttnbiasError(f"profile must be (below 1, above 1), got {profile!r}.")
    if rule.heads != "all" and any(isinstance(head, tuple) for head in rule.heads):
        raise AttnbiasError(
            "fit profiles each head number over all layers of the rule: write heads='all' or a "
            "list of head numbers, and layers=... for some layers."
        )
    if rule.phase == "decode":
        raise AttnbiasError(
            "fit scores the forward of a prompt, where phase='decode' never acts: write 'both'."
        )
    if model.training:
        raise AttnbiasError("fit needs the model in eval mode: write model.eval() first.")
    places = sites(model)
    if places:
        check_places(rule, places)


def _candidates(rule: ZeroTuning, model: nn.Module, example: Example) -> tuple[int, ...]:
    """The head numbers that the sites of the rule have in common (the fewest of any site)."""
    if rule.heads != "all":
        return tuple(sorted({head for head in rule.heads if isinstance(head, int)}))
    from attnbias.hub import attach

    count = _Count(rule)
    with torch.no_grad(), attach(model, count):
        model(**example.inputs)
    if not count.heads:
        raise AttnbiasError(
            "ZeroTuning acts at no layer that the model calls: check layers, towers."
        )
    return tuple(range(min(count.heads)))


class _Count:
    """A participant that only looks at the number of heads."""

    role = "see"

    def __init__(self, rule: ZeroTuning) -> None:
        self.rule = rule
        self.heads: set[int] = set()

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...

    def see(self, call: Call, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        if self.rule.acts_in(call.site.tower, call.site.layer, call.phase):
            self.heads.add(call.query.shape[1])
