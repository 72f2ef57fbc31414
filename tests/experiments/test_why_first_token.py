"""Without the sink a change of one token spreads further; without another token it does not."""

from __future__ import annotations

import torch

from experiments._triggers import texts, trained
from experiments.why_first_token import growth, ranks


def test_the_sink_keeps_a_change_from_spreading() -> None:
    model = trained(0, "softmax", 240)
    rows = texts(12, torch.Generator().manual_seed(8))
    effect, bound, found = growth(model, rows, 0)
    control, bound_control, _ = growth(model, rows, 5)
    assert effect > 1.0 > 0.1 > abs(control)
    assert bound > 0.3 > 0.1 > abs(bound_control)
    assert ranks(found) > 0.3
