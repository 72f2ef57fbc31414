"""VTI: captions with hidden states turned from hallucination."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    return tools.from_recipe(
        "vti-latent-steering", "rule = ab.rules.VTI(towers=('text',)).fit(model, pairs)"
    )


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.VTI)
    return (replace(own, directions=tools.shuffled(bench, own.directions), fitted=None),)


PROTOCOL = Protocol(
    work="vti-latent-steering",
    kind="captions",
    effect="Turning hidden states along the fitted directions lowers hallucinated objects.",
    score="chair_s",
    better="lower",
    rule=rule,
    control=control,
    control_says="The same turn along directions whose numbers are shuffled.",
    needs=("VTI",),
    cell=Cell(
        where="the work's table of CHAIR; its numbers were not read here",
        model="llava-hf/llava-1.5-7b-hf",
        data="500 images of COCO 2014 validation; the file of the items is not fixed here",
        score="chair_s",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
