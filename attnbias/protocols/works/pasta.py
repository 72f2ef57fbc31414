"""PASTA: answers from the document that is emphasised."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Published strength, on all heads: the published heads are those of a profile."""
    return (shelf.PASTA(keys=("gold",), heads="all"),)


def control(bench: Bench, rules: Rules) -> Rules:
    return (replace(tools.one(rules, shelf.PASTA), keys=("other",)),)


PROTOCOL = Protocol(
    work="pasta",
    kind="answers",
    effect="Emphasising the document that holds the answer makes the model answer from it.",
    score="match",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same emphasis on another document of the prompt, drawn for each item.",
    needs=("PASTA",),
    cell=Cell(
        where="the abstract: a mean gain of 22 % of accuracy over four tasks",
        model="huggyllama/llama-7b",
        data="the work's four tasks; no single one is fixed here",
        score="match",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
