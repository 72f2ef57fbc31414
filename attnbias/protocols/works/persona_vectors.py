"""Persona vectors: a trait in answers among given ones."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    return tools.from_recipe(
        "persona-vectors", "rule = ab.rules.PersonaVector().fit(model, with_trait, without_trait)"
    )


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.PersonaVector)
    return (replace(own, directions=tools.shuffled(bench, own.directions)),)


PROTOCOL = Protocol(
    work="persona-vectors",
    kind="choices",
    effect="Adding a trait's direction makes the answer with that trait the likeliest.",
    score="accuracy",
    better="higher",
    rule=rule,
    control=control,
    control_says=(
        "The same steps along directions whose numbers are shuffled; 'answer' is the one with "
        "the trait."
    ),
    needs=("PersonaVector",),
    cell=Cell(
        where=(
            "the work scores traits by a judging model, which this protocol has not; no cell fits"
        ),
        model="Qwen/Qwen2.5-7B-Instruct",
        data="the work's questions for each trait",
        score="accuracy",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
