"""GAME: answers from chunks that are redone with edited attention."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    return tools.from_recipe(
        "game",
        "lens = ab.rules.LookbackLens(heads='all', context=('gold',)).fit(model, texts); "
        "rule = ab.rules.GAME(detector=lens.detector, heads='all', context=('gold',))",
    )


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.GAME)
    found = own.detector
    mixed = tuple(bench.random.sample(found.weights, len(found.weights)))
    return (replace(own, detector=replace(found, weights=mixed)),)


PROTOCOL = Protocol(
    work="game",
    kind="answers",
    effect="Redoing chunks under the gradient's edit raises answers that follow the context.",
    score="match",
    better="higher",
    rule=rule,
    control=control,
    control_says=(
        "The same loop and size of edit with the gradient of a detector whose weights are shuffled."
    ),
    needs=("GAME",),
    cell=Cell(
        where="the abstract alone was read; it prints no cell",
        model="meta-llama/Llama-2-7b-chat-hf",
        data="not known here",
        score="match",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
