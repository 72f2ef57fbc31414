"""ZeroTuning: accuracy on classification with one factor on the first token."""

from __future__ import annotations

import math
from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Profiled and searched for accuracy of the first token of the right choice."""
    return (shelf.ZeroTuning(heads="all").fit(bench.model, tools.examples(bench), progress=False),)


def control(bench: Bench, rules: Rules) -> Rules:
    """The same factor on token 4."""
    (one,) = (rule for rule in rules if isinstance(rule, shelf.ZeroTuning))
    amount = math.log(one.factor or 1.0)
    return (
        replace(
            shelf.KeyShift(keys=(4,), amount=amount, heads="all"),
            heads=one.heads,
            layers=one.layers,
        ),
    )


PROTOCOL = Protocol(
    work="zerotuning",
    kind="choices",
    effect="One factor on the attention of token 0 raises the accuracy of classification.",
    score="accuracy",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same factor, heads and layers, on token 4 instead of token 0.",
    needs=("ZeroTuning",),
    fit=16,
    cell=Cell(
        where="the abstract: a mean gain of 11.71 % over the classification sets",
        model="meta-llama/Llama-3.1-8B-Instruct",
        data="the mean of the work's classification sets; no single one is fixed here",
        score="accuracy",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
