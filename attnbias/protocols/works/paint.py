"""PAINT: captions with image tokens raised."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf
from attnbias.steer.rule import Layers


def rule(bench: Bench) -> Rules:
    """Published strengths and, at a depth of 32, text layers."""
    layers, _ = tools.shape(bench)
    chosen: Layers = tuple(range(2, 32)) if layers == 32 else "all"
    from attnbias.hub import sites

    both = tuple(dict.fromkeys(site.tower for site in sites(bench.model)))
    return (shelf.PAINT(layers=chosen, heads="all", towers=both),)


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.PAINT)
    text = tools.towers(bench)
    return (replace(own, local=("question",), summary=("first",), towers=text),)


PROTOCOL = Protocol(
    work="paint",
    kind="captions",
    effect=(
        "Raising local and summary image tokens for the token being written lowers "
        "hallucinated objects."
    ),
    score="chair_s",
    better="lower",
    rule=rule,
    control=control,
    control_says="The same rise on the question's tokens and the first.",
    needs=("PAINT",),
    cell=Cell(
        where="the work's table of CHAIR; its numbers were not read here",
        model="llava-hf/llava-1.5-7b-hf",
        data="images of COCO 2014 validation; the file of the items is not fixed here",
        score="chair_s",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
