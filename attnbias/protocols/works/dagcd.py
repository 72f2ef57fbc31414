"""DAGCD: answers helped by the attention of context-reading heads."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols import answering
from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Detector fitted on the first items; the context is the document with the answer."""
    examples = []
    for item in bench.examples:
        inputs = answering.on_device(bench.model, bench.ask(item))
        answer = tools.answer_tokens(bench, item)
        examples.append(shelf.ContextExample(inputs, tools.gold(bench, item), answer))
    blank = shelf.DAGCD(heads="all", context=("gold",))
    return (blank.fit(bench.model, examples, seed=bench.seed, progress=False),)


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.DAGCD)
    return (replace(own, heads=tools.drawn_anywhere(bench, tools.pairs(bench, own))),)


PROTOCOL = Protocol(
    work="dagcd",
    kind="answers",
    effect=(
        "Adding the attention of context-reading heads to the distribution raises faithful answers."
    ),
    score="match",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same weights on as many heads, drawn from the others.",
    needs=("DAGCD",),
    fit=32,
    cell=Cell(
        where="the work's tables; none of their numbers was read here",
        model="meta-llama/Llama-2-7b-chat-hf",
        data="the work's question sets",
        score="match",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
