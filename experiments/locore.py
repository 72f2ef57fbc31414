"""LocoRE on a tiny decoder whose text goes on in one kind: what was just written decides more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias, Bucketed
from attnbias.steer import Rule, SiteCall
from experiments._copying import FIRST, OWN, START, Copying, copying, texts
from experiments.common import Experiment

ROWS, LENGTH, WINDOW, BETA = 400, 16, 5, 0.15


@dataclass(frozen=True, kw_only=True)
class Older(Rule):
    """The same factor on as many written tokens, those right before LocoRE's."""

    beta: float = BETA
    window: int = WINDOW

    def bias(self, site: SiteCall) -> Bias | None:
        keys = site.key_positions
        far = site.query_positions[..., None] - keys[:, None]
        chosen = (far > self.window) & (far <= 2 * self.window) & (keys >= START)[:, None]
        table = torch.zeros(chosen.shape).masked_fill(chosen, 1.0) * (1 + self.beta)
        table = torch.where(chosen, table.clamp(min=1).log(), 0.0)
        return Bucketed(table[:, None], None, torch.arange(keys.shape[1])[None, None])


@torch.no_grad()
def coherence(toy: Copying, ids: Tensor, rule: Rule | None) -> float:
    """Mean log-odds (nats) that the next token is of the kind of the last five."""
    kind = toy.faithful(ids)
    recent = kind[:, -WINDOW:]
    same = (recent == recent[:, :1]).all(1)  # five of one kind
    mixed = (kind[:, -2 * WINDOW : -WINDOW] != recent[:, :1]).any(1)
    rows, faithful = ids[same & mixed], recent[same & mixed, 0]
    spans = {"generated": (START, None)}
    if rule is None:
        scores = toy.model(rows).logits[:, -1]
    else:
        with ab.steer(toy.model, rule, spans=spans):
            scores = toy.model(rows).logits[:, -1]
    own = scores[:, FIRST : FIRST + OWN].logsumexp(-1)
    told = scores.gather(1, rows[:, 1 : START - 1]).logsumexp(-1)
    return float(torch.where(faithful, told - own, own - told).mean())


def measure(seed: int) -> Mapping[str, float]:
    """How much likelier the text goes on as it just did."""
    toy = copying(seed)
    ids = texts(ROWS, LENGTH, torch.Generator().manual_seed(seed + 300))
    plain = coherence(toy, ids, None)
    rule = ab.rules.LocoRE(beta=BETA, window=WINDOW, heads="all")
    return {
        "effect": coherence(toy, ids, rule) - plain,
        "control": coherence(toy, ids, Older(heads="all")) - plain,
        "plain": plain,
    }


EXPERIMENT = Experiment(
    work="lvlms-saliency-locore",
    claim=(
        "Under LocoRE with the published gain 0.15 a text is likelier to go on in the kind of its "
        "last five tokens than under the same gain on older ones."
    ),
    control="The same gain on the five written tokens before those.",
    measure=measure,
)
