"""VHR: captions with vision-aware heads reinforced."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf
from attnbias.steer.rule import Layers


def rule(bench: Bench) -> Rules:
    """Published layers for a depth of 32: the second and the last 14."""
    layers, _ = tools.shape(bench)
    chosen: Layers = (1, *range(18, 32)) if layers == 32 else "all"
    return (shelf.VHR(layers=chosen, towers=tools.towers(bench)),)


def control(bench: Bench, rules: Rules) -> Rules:
    return (replace(tools.one(rules, shelf.VHR), image=("question",)),)


PROTOCOL = Protocol(
    work="vhr",
    kind="captions",
    effect="Reinforcing the heads whose output the image moves most lowers hallucinated objects.",
    score="chair_s",
    better="lower",
    rule=rule,
    control=control,
    control_says=(
        "As many heads reinforced alike, chosen by the question's removal instead of the image's."
    ),
    needs=("VHR",),
    cell=Cell(
        where="ablation of the choice of heads: CHAIR_S of the full method, LLaVA-1.5",
        model="llava-hf/llava-1.5-7b-hf",
        data="500 images of COCO 2014 validation; the file of the items is not fixed here",
        score="chair_s",
        plain=None,
        rule=0.333,
        margin=0.02,
    ),
)
