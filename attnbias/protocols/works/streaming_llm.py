"""StreamingLLM: text far beyond the window, with and without sinks."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """A quarter of the context that the model was trained with, as published at 1,020 of 4,096."""
    config = bench.model.config.get_text_config()
    recent = max(8, int(config.max_position_embeddings) // 4 - 4)
    return (shelf.StreamingLLM(sinks=4, recent=recent, heads="all"),)


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.StreamingLLM)
    return (replace(own, sinks=0, recent=own.recent + own.sinks),)


PROTOCOL = Protocol(
    work="streaming-llm",
    kind="texts",
    effect="With four first tokens kept, text beyond the window is predicted as well as inside it.",
    score="log_probability",
    better="higher",
    rule=rule,
    control=control,
    control_says="A window of as many tokens without the first four.",
    needs=("StreamingLLM",),
    cell=Cell(
        where=(
            "the work's table of perplexity by number of first tokens kept; its numbers were "
            "not read here"
        ),
        model="meta-llama/Llama-2-7b-hf",
        data="PG19, the first book, 65,000 tokens",
        score="log_probability",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
