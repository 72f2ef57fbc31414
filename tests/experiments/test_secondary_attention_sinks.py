"""Planted secondary sinks draw attention and are found; random directions are not."""

from __future__ import annotations

from experiments.secondary_attention_sinks import measure


def test_planted_sinks_and_random_directions() -> None:
    found = measure(1)
    assert found["effect"] > 3 * found["control"]
    assert found["f1"] > 0.9 > 0.1 > found["f1_random"]
    assert found["score_rescaled"] < found["effect"] / 3
    assert found["levels"] == 2
