"""VHR on a decoder whose memory and "image" conflict: its heads beside as many others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Branch, Rule, SiteCall
from attnbias.steer.rule import Heads
from experiments._toys import conflict
from experiments.alfar import ROWS, told
from experiments.common import Experiment


@dataclass(frozen=True, kw_only=True)
class Others(Rule):
    """The heads that VHR does not choose, scaled so that the outputs grow by the same norm."""

    heads: Heads = "all"
    strength: float = 2.0

    @property
    def branches(self) -> Mapping[str, Branch]:
        return self._vhr.branches

    @property
    def _vhr(self) -> ab.rules.VHR:
        return ab.rules.VHR(strength=self.strength)

    def look(self, site: SiteCall) -> Tensor | None:
        return self._vhr.look(site)

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        found = self._vhr.divergence(site)
        chosen = found > found.quantile(0.5, -1, keepdim=True)
        power = out.square().sum((2, 3))  # of each head, over all tokens
        wanted = ((self.strength**2 - 1) * power * chosen).sum(-1, keepdim=True)
        rest = (power * ~chosen).sum(-1, keepdim=True)
        factor = torch.where(chosen, 1.0, (1 + wanted / rest).sqrt())
        return out * factor[..., None, None]


def measure(seed: int) -> dict[str, float]:
    toy = conflict(seed)
    prompts = toy.prompts(ROWS, 1000 + seed)
    spans = {"image": toy.spans["context"]}  # what is seen here are the facts
    return {
        "effect": told(toy, prompts, ab.rules.VHR(), spans),
        "control": told(toy, prompts, Others(), spans),
        "plain": told(toy, prompts, None, spans),
        "strength 4": told(toy, prompts, ab.rules.VHR(strength=4.0), spans),
    }


EXPERIMENT = Experiment(
    work="vhr",
    claim="Heads whose outputs change most without the seen part, reinforced by 2, raise how often "
    "a decoder answers by that part where it conflicts with what it has learnt.",
    control="the other heads of each layer, scaled so that the squared norm of the layer's head "
    "outputs grows by the same amount",
    measure=measure,
)
