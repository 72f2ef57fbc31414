"""LocoRE: captions with attention kept on what was just written."""

from __future__ import annotations

from typing import Any

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf
from attnbias.steer.rule import Layers


def rule(bench: Bench) -> Rules:
    """Published strength and, at a depth of 32, layers."""
    layers, _ = tools.shape(bench)
    chosen: Layers = tuple(range(9, 15)) if layers == 32 else "all"
    return (shelf.LocoRE(layers=chosen, heads="all", towers=tools.towers(bench)),)


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.LocoRE)
    place: dict[str, Any] = {name: getattr(own, name) for name in ("heads", "layers", "towers")}
    return (shelf.KeyShift(keys=("question",), factor=1 + own.beta, phase="decode", **place),)


PROTOCOL = Protocol(
    work="lvlms-saliency",
    kind="captions",
    effect="More attention on the last few written tokens lowers hallucinated objects.",
    score="chair_s",
    better="lower",
    rule=rule,
    control=control,
    control_says="The same factor on the question's tokens while decoding.",
    needs=("LocoRE",),
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
