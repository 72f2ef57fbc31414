"""A decoder that was trained until it has a sink is centralised; untrained it has no frame."""

from __future__ import annotations

import torch

from experiments._triggers import fresh, texts, trained
from experiments.sink_reference_frames import frame, share


def test_the_trained_decoder_is_centralised() -> None:
    rows = [{"input_ids": texts(20, torch.Generator().manual_seed(4), 50)}]
    found = frame(trained(0, "softmax", 240), rows)
    assert share(found, "centralised") > 0.8
    assert found.type == "centralised"
    assert int(found.anchored.nansum(0).argmax()) == 0
    with torch.random.fork_rng():
        bare = frame(fresh(0, "softmax", 1, 1, 32).eval(), rows)
    assert share(bare, "centralised") < 0.1
