"""Lookback Lens: answers from chunks that look back at the context."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    return tools.from_recipe(
        "lookback-lens",
        "rule = ab.rules.LookbackLens(heads='all', context=('gold',)).fit(model, texts)",
    )


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.LookbackLens)
    found = own.detector
    mixed = tuple(bench.random.sample(found.weights, len(found.weights)))
    return (replace(own, detector=replace(found, weights=mixed)),)


PROTOCOL = Protocol(
    work="lookback-lens",
    kind="answers",
    effect="Choosing chunks by look-back ratios raises answers that follow the context.",
    score="match",
    better="higher",
    rule=rule,
    control=control,
    control_says=(
        "The same choice among as many candidates by a detector whose weights are shuffled "
        "over heads."
    ),
    needs=("LookbackLens",),
    cell=Cell(
        where=(
            "the work's table of guided decoding on NaturalQuestions; its numbers were not "
            "read here"
        ),
        model="meta-llama/Llama-2-7b-chat-hf",
        data="NaturalQuestions with a gold document; the file of the items is not fixed here",
        score="match",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
