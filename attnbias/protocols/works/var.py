"""VAR: questions about images with the attention of sinks given to the image."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols import answering
from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Sink dimensions found on the first items; published thresholds."""
    prompts = [answering.on_device(bench.model, bench.ask(item)) for item in bench.examples]
    blank = shelf.VAR(heads="all", towers=tools.towers(bench))
    return (blank.fit(bench.model, prompts, progress=False),)


def control(bench: Bench, rules: Rules) -> Rules:
    """Other dimensions at a threshold of 1, so that they too have tokens above it."""
    own = tools.one(rules, shelf.VAR)
    size = bench.model.config.get_text_config().hidden_size
    rest = [d for d in range(size) if d not in own.dims]
    dims = tuple(bench.random.sample(rest, len(own.dims)))
    return (replace(own, dims=dims, tau=1.0, fitted=None),)


PROTOCOL = Protocol(
    work="visual-attention-sink-var",
    kind="image choices",
    effect="Giving the attention of sinks to the rest of the image raises accuracy.",
    score="accuracy",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same redistribution from tokens that are large in drawn dimensions.",
    needs=("VAR",),
    fit=8,
    cell=Cell(
        where="the work's tables; none of their numbers was read here",
        model="llava-hf/llava-1.5-7b-hf",
        data="the work's data sets; no single one is fixed here",
        score="accuracy",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
