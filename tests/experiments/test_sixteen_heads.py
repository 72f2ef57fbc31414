from __future__ import annotations

from experiments import sixteen_heads


def test_pruning_by_importance_costs_least() -> None:
    found = sixteen_heads.measure(0)
    assert found["no head out"] > 0.9
    assert found["effect"] > found["control"] + 0.05
    assert found["effect"] > found["most important first"] + 0.1
    assert found["effect"] > found["lowest magnitude first"]
