"""A change of one token spreads further where the sink is hidden."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import attnbias as ab
from attnbias.measures.mixing import Mixed
from experiments._triggers import texts, trained
from experiments.common import Experiment
from experiments.streaming_llm import texts as plays
from experiments.zerotuning import _loaded

ROWS, OTHER = 16, 5


def growth(model: Any, rows: Tensor, sink: int) -> tuple[float, float, Mixed]:
    """Log-ratio of the mean spread without and with a token, the same of the bound, and all."""
    found: Mixed = ab.measures.Mixing(sink=sink).measure(model, [{"input_ids": rows}])
    first, second = found.spread[..., -1].nanmean(0).tolist()
    low, high = found.bound[:, :, -1].nanmean((0, 2)).tolist()
    return math.log(second / first), math.log(high / low), found


def ranks(found: Mixed) -> float:
    """Spearman's correlation of change and bound over tokens, after the last layer, with sink."""
    change, bound = found.change[:, 0, -1].flatten(), found.bound[:, 0, -1].flatten()
    known = ~change.isnan()
    both = torch.stack([x[known].argsort().argsort().double() for x in (change, bound)])
    return float(torch.corrcoef(both)[0, 1])


def measure(seed: int) -> Mapping[str, float]:
    """Growth of the spread (natural log) without the first token, and without another one."""
    model = trained(seed, "softmax", 240)
    rows = texts(ROWS, torch.Generator().manual_seed(70_000 + seed))
    effect, bound, found = growth(model, rows, 0)
    control, bound_control, _ = growth(model, rows, OTHER)
    real = plays(seed)[:8, :64]
    return {
        "effect": effect,
        "control": control,
        "bound": bound,
        "bound_control": bound_control,
        "rank_correlation_of_change_and_bound": ranks(found),
        "sink_metric": _sinks(model, rows, 0.3),
        "sink_metric_at_0.8": _sinks(model, rows, 0.8),
        "stories": growth(_loaded()[0], real, 0)[0],
        "stories_sink_metric": _sinks(_loaded()[0], real, 0.3),
    }


def _sinks(model: Any, rows: Tensor, threshold: float) -> float:
    found = ab.measures.SinkMetric(threshold).measure(model, [{"input_ids": rows}])
    return float(found.details["metric"])


EXPERIMENT = Experiment(
    work="why-first-token",
    claim=(
        "In a decoder trained here that has a sink on its first token, a change of one token "
        "spreads further (natural log of the ratio of mean relative changes of the other tokens) "
        "when the sink is hidden."
    ),
    control="Another early token (the sixth) is hidden instead.",
    measure=measure,
    seeds=(0, 1, 2, 3),
)
