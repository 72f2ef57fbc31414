from __future__ import annotations

from experiments import game


def test_the_gradient_raises_the_score_more_than_chance() -> None:
    found = game.measure(1)
    assert found["chunks"] >= 10
    assert found["effect"] > 0.5
    assert found["effect"] > found["control"] + 0.5
    assert found["effect"] > found["uniform"]
    assert found["faithful"] > found["faithful random"] + 0.05
