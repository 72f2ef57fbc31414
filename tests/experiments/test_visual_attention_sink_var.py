from __future__ import annotations

from experiments import visual_attention_sink_var as var


def test_the_image_is_answered_better_without_its_sinks() -> None:
    found = var.measure(1)
    assert found["found_the_planted_dimension"] == 1.0
    assert found["effect"] > 0.02
    assert found["effect"] > 5 * abs(found["control"])
