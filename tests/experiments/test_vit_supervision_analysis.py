from __future__ import annotations

from experiments import vit_supervision_analysis


def test_a_model_taught_its_neighbour_has_a_head_at_that_offset() -> None:
    found = vit_supervision_analysis.measure(0)
    assert found["effect"] > found["control"] + 0.15
    assert found["the offset taught is the one found"] == 1.0
