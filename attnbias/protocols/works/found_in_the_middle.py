"""Found in the middle: answers wherever the document with the answer stands."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols import answering
from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Published settings; the dummy document is the word "dummy"."""
    tokenizer = getattr(bench.processor, "tokenizer", bench.processor)
    dummy = tuple(answering.continuation(tokenizer, "dummy"))
    return (shelf.FoundInTheMiddle(dummy=dummy, heads="all"),)


def control(bench: Bench, rules: Rules) -> Rules:
    """At a temperature this high the shares are equal."""
    return (replace(tools.one(rules, shelf.FoundInTheMiddle), temperature=1e6),)


PROTOCOL = Protocol(
    work="found-in-the-middle",
    kind="answers",
    effect="Calibrated attention on documents raises the accuracy of answers over many documents.",
    score="match",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same reallocation with equal shares for all documents: no relevance in it.",
    needs=("FoundInTheMiddle",),
    cell=Cell(
        where="the abstract: up to 15 percentage points",
        model="lmsys/vicuna-7b-v1.5-16k",
        data="NaturalQuestions with 20 documents; the file of the items is not fixed here",
        score="match",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
