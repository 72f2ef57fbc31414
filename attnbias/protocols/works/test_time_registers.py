"""Test-time registers: outliers among patch norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnbias.protocols import answering
from attnbias.protocols.base import Bench, Cell, Protocol, Rules
from attnbias.protocols.works import _tools as tools
from attnbias.steer import rules as shelf


def rule(bench: Bench) -> Rules:
    """Neurons found on the first images; the thresholds are the library's own."""
    images = [answering.on_device(bench.model, bench.ask(item)) for item in bench.examples]
    blank = shelf.TestTimeRegisters()
    return (blank.fit(bench.model, images, top_k=10, progress=False),)


def control(bench: Bench, rules: Rules) -> Rules:
    own = tools.one(rules, shelf.TestTimeRegisters)
    config = bench.model.config
    width = getattr(config, "intermediate_size", None)
    width = width or config.hidden_size * getattr(config, "mlp_ratio", 4)
    taken = set(own.neurons)
    made = []
    for layer, _ in own.neurons:
        unit = bench.random.choice([n for n in range(int(width)) if (layer, n) not in taken])
        taken.add((layer, unit))
        made.append((layer, unit))
    return (replace(own, neurons=tuple(made), fitted=None),)


def outlier(model: Any, prompt: Any, item: Any) -> dict[str, float]:
    """The largest patch norm of the last layer over the median one, the first token left out."""
    inputs = answering.on_device(model, prompt)
    states = model(**inputs, output_hidden_states=True).hidden_states[-1]
    norms = states[0, 1:].float().norm(dim=-1)
    return {"outlier": float(norms.max() / torch.median(norms))}


PROTOCOL = Protocol(
    work="test-time-registers",
    kind="images",
    effect=(
        "Moving register neurons to an added token removes the outliers among patch norms; "
        "classes stay."
    ),
    score="outlier",
    better="lower",
    rule=rule,
    control=control,
    control_says="As many neurons of the same layers, drawn, moved to an added token.",
    needs=("TestTimeRegisters",),
    fit=16,
    measure=outlier,
    cell=Cell(
        where="the work's tables are of dense tasks; none of their numbers was read here",
        model="facebook/dinov2-large",
        data="images of ImageNet",
        score="outlier",
        plain=None,
        rule=None,
        margin=0.01,
    ),
)
