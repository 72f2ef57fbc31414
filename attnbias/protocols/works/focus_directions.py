"""Focus directions: answers from the document that focusing heads look at."""

from __future__ import annotations

from dataclasses import replace

import torch

from attnbias.protocols import answering
from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Heads and directions found on the first items, their answers appended."""
    examples = []
    for item in bench.examples:
        inputs = answering.on_device(bench.model, bench.ask(item))
        ids = inputs["input_ids"]
        more = torch.tensor([tools.answer_tokens(bench, item)], device=ids.device)
        both = torch.cat([ids, more], 1)
        made = {"input_ids": both, "attention_mask": torch.ones_like(both)}
        where = (ids.shape[1], both.shape[1])
        examples.append(shelf.FocusExample(made, tools.gold(bench, item), where))
    layers, heads = tools.shape(bench)
    blank = shelf.FocusDirections(heads="all")
    top = min(20, layers * heads)
    with torch.enable_grad():
        return (blank.fit(bench.model, examples, top=top, seed=bench.seed, progress=False),)


def control(bench: Bench, rules: Rules) -> Rules:
    """The numbers of each direction in another order: the same length."""
    own = tools.one(rules, shelf.FocusDirections)
    mixed = tuple(tuple(bench.random.sample(d, len(d))) for d in own.directions)
    return (replace(own, directions=mixed, fitted=None),)


PROTOCOL = Protocol(
    work="focus-directions",
    kind="answers",
    effect=(
        "Directions added to the queries of contextual heads turn them to the relevant document."
    ),
    score="match",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same heads with directions of the same length whose numbers are shuffled.",
    needs=("FocusDirections",),
    fit=16,
    cell=Cell(
        where="the work's figures; none of their numbers was read here",
        model="meta-llama/Llama-3.2-3B-Instruct",
        data="the work's multi-document questions",
        score="match",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
