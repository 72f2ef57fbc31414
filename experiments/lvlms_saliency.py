"""Saliency of a tiny decoder's own tokens beside that of corrupted ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import attnbias as ab
from attnbias.steer import Loop, Rule, SiteCall
from attnbias.steer.rule import Heads, Layers
from attnbias.steer.rules import SGRS
from attnbias.steer.rules.sgrs import Row
from experiments._copying import FIRST, OWN, VOCABULARY, copying
from experiments.common import Experiment
from experiments.lookback_lens import auroc

PROMPTS, LENGTH = 10, 16
LAYERS = (0, 1)


@dataclass(frozen=True, kw_only=True)
class Scorer(Rule):
    """SGRS's saliency in a loop that samples and scores, rejecting nothing."""

    heads: Heads = "all"
    layers: Layers = LAYERS
    rule: SGRS
    run: Callable[[Loop], None]

    def outputs(self, site: SiteCall, out: Tensor) -> Tensor | None:
        return self.rule.outputs(site, out)

    def look(self, site: SiteCall) -> Row | None:
        return self.rule.look(site)

    def decode(self, loop: Loop) -> None:
        self.run(loop)


def measure(seed: int) -> Mapping[str, float]:
    """How well saliency, and raw attention, tell the likeliest token from a corrupted one."""
    decoder = copying(seed)
    rule = SGRS(layers=LAYERS, after=("first",))
    generator = torch.Generator().manual_seed(seed)
    salient: list[float] = []
    attended: list[float] = []
    own: list[bool] = []

    def run(loop: Loop) -> None:
        while not loop.finished:
            step = loop.step_with_gradients()
            known = {*loop.tokens[0].tolist(), *range(FIRST, FIRST + OWN)}
            others = [token for token in range(FIRST, VOCABULARY) if token not in known]
            wrong = others[int(torch.randint(len(others), (1,), generator=generator))]
            for token in (int(step.logits.argmax()), wrong):
                score = rule.saliency(step, token)
                assert score is not None
                salient.append(score)
                after = step.follow(torch.tensor([token])).looked.values()
                rows = [row.attention[:, row.earlier][:, :-1].mean() for row in after]
                attended.append(float(torch.stack(rows).mean()))
                own.append(token != wrong)
            loop.append(loop.scores().softmax(-1).multinomial(1))

    prompts = decoder.prompts(PROMPTS, 300 + seed)
    torch.manual_seed(seed)
    with ab.steer(decoder.model, Scorer(rule=rule, run=run), spans=decoder.spans):
        decoder.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=LENGTH,
            do_sample=False,
        )
    kinds = torch.tensor(own)
    return {
        "effect": auroc(torch.tensor(salient), kinds),
        "control": auroc(torch.tensor(attended), kinds),
    }


EXPERIMENT = Experiment(
    work="lvlms-saliency",
    claim=(
        "Saliency on earlier tokens (of the row that predicts) tells a tiny decoder's likeliest "
        "token from a symbol that fits neither its context nor what it knows (AUROC)."
    ),
    control="Raw attention of the token's own row to the same earlier tokens.",
    measure=measure,
)
