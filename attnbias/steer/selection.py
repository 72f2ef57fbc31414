"""The search behind `ACT.fit`: heads that raise a score when they alone are edited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.steer.context import check_places
from attnbias.steer.rule import Rule
from attnbias.steer.rules.act import ACT, Selected
from attnbias.steer.scoring import bar, examples_of, score

if TYPE_CHECKING:
    from attnbias.hub import Call


def select(
    rule: ACT,
    model: nn.Module,
    examples: Sequence[Any],
    by: Literal["accuracy", "log_probability"],
    progress: bool,
) -> ACT:
    """See `ACT.fit`."""
    from attnbias.hub import sites

    if by not in ("accuracy", "log_probability"):
        raise AttnbiasError(f"by must be 'accuracy' or 'log_probability', got {by!r}.")
    if rule.phase == "decode":
        raise AttnbiasError(
            "fit scores the forward of a prompt, where phase='decode' never acts: write 'both'."
        )
    if model.training:
        raise AttnbiasError("fit needs the model in eval mode: write model.eval() first.")
    kept = examples_of(examples, "accuracy")
    places = sites(model)
    if places:
        check_places(rule, places)
    candidates = candidate_heads(rule, model, kept[0].inputs)
    place = 0 if by == "accuracy" else 1
    with bar(2 + len(candidates), progress, "ACT") as tick:

        def scored(trial: ACT) -> tuple[float, float]:
            right, log_probability = score(trial, model, kept, "accuracy")
            tick()
            return right, log_probability

        plain = scored(replace(rule, beta=1.0, selected=None))
        scores = [(*pair, *scored(rule.calibrating(*pair))) for pair in candidates]
        heads = tuple((s[0], s[1]) for s in scores if s[2 + place] > plain[place])
        if not heads:
            raise AttnbiasError(
                f"none of {len(scores)} heads raises the {by.replace('_', '-')} of "
                f"{len(kept)} examples when it is calibrated: give more examples, other layers or "
                "another threshold."
            )
        chosen = replace(rule, heads=heads, layers="all", selected=None)
        together = scored(chosen)
    return replace(chosen, selected=Selected(by, len(kept), plain, together, tuple(scores)))


def candidate_heads(rule: Rule, model: nn.Module, inputs: Any) -> list[tuple[int, int]]:
    """Every (layer, head) that a rule names, in order; of all layers not the first two and last."""
    from attnbias.hub import attach

    count = Count(rule)
    with torch.no_grad(), attach(model, count):
        model(**inputs)
    layers = sorted(count.heads)
    if rule.layers == "all" and not rule.named_layers():
        layers = layers[2:-1]
    found = []
    for layer in layers:
        named = rule.heads_at(layer)
        heads = range(count.heads[layer]) if named == "all" else named
        found += [(layer, head) for head in heads]
    if not found:
        raise AttnbiasError(
            f"{type(rule).__name__} has no head to select from: the model has "
            f"{len(count.heads)} layers, of which the first two and the last are left out unless "
            "layers=... names them."
        )
    return found


class Count:
    """A participant that only looks at the number of heads of each layer."""

    role = "see"

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.heads: dict[int, int] = {}

    def begin_forward(self, forward: int) -> None: ...

    def end_forward(self, forward: int) -> None: ...

    def see(self, call: Call, extra: Any, output: Tensor, lse: Tensor | None) -> None:
        if self.rule.acts_in(call.site.tower, call.site.layer, call.phase):
            self.heads[call.site.layer] = call.query.shape[1]
