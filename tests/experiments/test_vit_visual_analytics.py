from __future__ import annotations

from experiments import vit_visual_analytics


def test_heads_important_alone_cost_most_together() -> None:
    found = vit_visual_analytics.measure(0)
    assert found["plain accuracy"] > 0.8
    assert found["effect"] > found["control"] + 0.1
    assert found["effect"] > found["least important"] + 0.1
