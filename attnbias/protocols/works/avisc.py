"""AvisC: yes or no about objects, contrasted with blind tokens."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    return (shelf.AVISC(towers=tools.towers(bench)),)


def control(bench: Bench, rules: Rules) -> Rules:
    return (replace(tools.one(rules, shelf.AVISC), image=("question",)),)


PROTOCOL = Protocol(
    work="avisc",
    kind="image choices",
    effect=(
        "Contrasting with a branch that sees blind tokens alone raises accuracy on questions "
        "about objects."
    ),
    score="accuracy",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same contrast with the question's tokens in place of the image's.",
    needs=("AVISC",),
    cell=Cell(
        where="the work's tables of POPE; none of their numbers was read here",
        model="llava-hf/llava-1.5-7b-hf",
        data="POPE",
        score="accuracy",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
