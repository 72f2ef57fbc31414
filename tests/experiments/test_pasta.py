from __future__ import annotations

from experiments import circuit_reuse, focus_directions, pasta

# One tiny decoder is trained for all of them.


def test_emphasis_on_the_fact_that_answers() -> None:
    found = pasta.measure(0)
    assert found["effect"] > 0.1
    assert found["control"] < 0


def test_a_hard_pattern_on_the_fact_that_answers() -> None:
    found = circuit_reuse.measure(0)
    assert found["effect"] > 0.1
    assert found["effect"] > found["control"] + 0.2
    assert found["effect"] > found["other_heads"]


def test_learnt_directions_beside_random_ones() -> None:
    found = focus_directions.measure(0)
    assert found["share_after"] > found["share_before"] + 0.05
    assert found["effect"] > 0.01
    assert found["effect"] > found["control"] + 0.01
    assert found["turned_round"] < 0
