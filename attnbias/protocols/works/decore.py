"""DeCoRe: answers contrasted with a model whose retrieval heads are blocked."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols import answering
from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Retrieval heads found on the first items, whose documents must hold their answers."""
    needles = []
    for item in bench.examples:
        inputs = answering.on_device(bench.model, bench.ask(item))
        answer = tools.answer_tokens(bench, item)
        needles.append(shelf.Needle(inputs, tools.gold(bench, item), answer))
    layers, heads = tools.shape(bench)
    count = min(50, max(1, layers * heads // 20))  # published: 50 of some 1,000
    blank = shelf.DeCoRe(heads="all")
    return (blank.fit(bench.model, needles, count=count, progress=False),)


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.DeCoRe)
    heads = tools.drawn_anywhere(bench, tools.pairs(bench, own))
    return (replace(own, heads=heads, scores=()),)


PROTOCOL = Protocol(
    work="decore",
    kind="answers",
    effect="Contrasting with blocked retrieval heads raises answers that follow the context.",
    score="match",
    better="higher",
    rule=rule,
    control=control,
    control_says="As many heads blocked in the branch, drawn from the others.",
    needs=("DeCoRe",),
    fit=16,
    cell=Cell(
        where="the abstract: NQ-Swap better by 5.5 %",
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        data="NQ-Swap; the file of the items is not fixed here",
        score="match",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
