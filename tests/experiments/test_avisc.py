from __future__ import annotations

from experiments import avisc


def test_the_planted_token_is_found_and_contrasted_away() -> None:
    found = avisc.measure(0)
    assert found["plain"] < found["nothing planted"] - 0.3
    assert found["planted token found blind"] > 0.8
    assert found["effect"] > found["control"] + 0.03
