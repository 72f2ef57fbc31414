"""AVISC where one image token draws attention whatever is asked: found, and contrasted away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Branch, Rule, SiteCall, Step
from attnbias.steer.rule import Heads
from attnbias.steer.rules.avisc import BRANCH
from experiments._toys import conflict
from experiments.alfar import ROWS
from experiments.common import Experiment

DRAW = 1000.0  # by how much the planted token's attention is multiplied


@dataclass(frozen=True, kw_only=True)
class Drawn(Rule):
    """AVISC with one image token drawn at random instead of those that it finds blind."""

    heads: Heads = "all"
    seed: int

    @property
    def branches(self) -> Mapping[str, Branch]:
        return {BRANCH: Branch(embeds="emptied")}

    def look(self, site: SiteCall) -> Tensor | None:
        return ab.rules.AVISC().look(site)

    def emptied(self, step: Step, embeddings: Tensor) -> Tensor:
        image = step.where(("image",))
        generator = torch.Generator().manual_seed(self.seed)
        place = torch.rand(image.shape, generator=generator).masked_fill(~image, -1).argmax(-1)
        kept = torch.zeros_like(image).scatter(1, place[:, None], True)
        return embeddings.masked_fill((image & ~kept)[..., None], 0.0)

    def logits(self, step: Step) -> Tensor | None:
        return ab.rules.AVISC().logits(step)


@dataclass(frozen=True, kw_only=True)
class Found(Rule):
    """Looks as AVISC does and keeps which tokens it would call blind."""

    heads: Heads = "all"
    kept: list[Tensor]

    def look(self, site: SiteCall) -> Tensor | None:
        return ab.rules.AVISC().look(site)

    def logits(self, step: Step) -> Tensor | None:
        self.kept.append(ab.rules.AVISC().blind(step))
        return None


@torch.no_grad()
def measure(seed: int) -> Mapping[str, float]:
    toy = conflict(seed)
    prompts = toy.prompts(ROWS, 1000 + seed, known=0.0)
    start, stop = toy.spans["context"]  # here the facts are what is seen
    generator = torch.Generator().manual_seed(seed)
    facts = prompts.tokens[:, start:stop]
    chance = torch.rand(facts.shape, generator=generator)
    place = start + chance.masked_fill(facts == prompts.told[:, None], -1).argmax(-1)
    planted = [(int(at), int(at) + 1) for at in place]
    drawn = ab.rules.KeyShift(keys=("planted",), factor=DRAW, heads="all")
    kept: list[Tensor] = []

    def right(rule: Rule | None) -> float:
        spans = {"image": (start, stop)}
        with ab.steer(toy.model, drawn, spans={"planted": planted}):
            if rule is None:
                logits = toy.model(prompts.tokens).logits[:, -1]
            else:
                with ab.steer(toy.model, rule, spans=spans):
                    logits = toy.model(prompts.tokens).logits[:, -1]
        return float((logits.argmax(-1) == prompts.told).float().mean())

    right(Found(kept=kept))
    wanted = torch.zeros_like(kept[0]).scatter(1, place[:, None], True)
    with_none = toy.model(prompts.tokens).logits[:, -1].argmax(-1) == prompts.told
    return {
        "effect": right(ab.rules.AVISC()),
        "control": right(Drawn(seed=seed)),
        "plain": right(None),
        "nothing planted": float(with_none.float().mean()),
        "planted token found blind": float((kept[0] & wanted).any(-1).float().mean()),
        "blind tokens": float(kept[0].sum(-1).float().mean()),
    }


EXPERIMENT = Experiment(
    work="avisc",
    claim="Where one of the seen tokens draws attention whatever is asked, contrasting with the "
    "blind tokens brings back answers that depend on the others.",
    control="the same contrast with a branch that keeps one seen token drawn at random",
    measure=measure,
)
