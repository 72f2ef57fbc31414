"""The sink of a small model vanishes with sigmoid attention, at a similar loss."""

from __future__ import annotations

import torch

from experiments._triggers import loss_of, texts, trained
from experiments.attention_sink_emerges import observed, sink


def test_the_sink_is_there_with_softmax_and_not_with_sigmoid() -> None:
    rows = texts(60, torch.Generator().manual_seed(7))
    softmax, sigmoid = trained(0, "softmax", 240), trained(0, "sigmoid", 240)
    assert sink(softmax, rows) > 0.8
    assert sink(sigmoid, rows) < 0.1
    with torch.no_grad():
        first, second = float(loss_of(softmax, rows)), float(loss_of(sigmoid, rows))
        without = float(loss_of(softmax, rows, hide=0))
    assert abs(first - second) < 0.05
    assert without > first + 0.05
    assert observed(softmax, rows) == sink(softmax, rows)  # the statistic, and whole eager maps
