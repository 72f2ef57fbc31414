"""Split-softmax: a system prompt that is followed late in a prompt."""

from __future__ import annotations

from dataclasses import replace

from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """The work sweeps the power; this is the middle of (0, 1)."""
    return (shelf.SplitSoftmax(power=0.5, heads="all", phase="both"),)


def control(bench: Bench, rules: Rules) -> Rules:
    return (replace(tools.one(rules, shelf.SplitSoftmax), keys=("question",)),)


PROTOCOL = Protocol(
    work="split-softmax-instruction-drift",
    kind="choices",
    effect="More attention on the system prompt keeps the model to its instruction.",
    score="accuracy",
    better="higher",
    rule=rule,
    control=control,
    control_says="The same power on the question's share; items need 'system'.",
    needs=("SplitSoftmax",),
    cell=Cell(
        where=(
            "the work compares curves at equal loss of MMLU; it prints no single number for "
            "one setting"
        ),
        model="meta-llama/Llama-2-70b-chat-hf",
        data="20 ordered pairs of five instructions",
        score="accuracy",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
