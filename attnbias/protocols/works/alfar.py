"""ALFAR: questions about an image with a retrieved text."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Published strength, in the form that does not turn on the sign of scores."""
    return (shelf.ALFAR(heads="all", towers=tools.towers(bench)),)


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.ALFAR)
    return (replace(own, image=own.context, context=own.image),)


PROTOCOL = Protocol(
    work="alfar",
    kind="image choices",
    effect=(
        "Reallocation from image to context and fused logits make answers follow the "
        "retrieved text."
    ),
    score="accuracy",
    better="higher",
    rule=rule,
    control=control,
    control_says=(
        "The same strength the other way round: from context to image; items need 'documents'."
    ),
    needs=("ALFAR",),
    cell=Cell(
        where="the work's tables; none of their numbers was read here",
        model="llava-hf/llava-1.5-7b-hf",
        data="five sets of knowledge questions about images",
        score="accuracy",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
