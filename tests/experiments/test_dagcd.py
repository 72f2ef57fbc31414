from __future__ import annotations

from experiments import dagcd


def test_used_tokens_do_more_than_drawn_ones() -> None:
    found = dagcd.measure(0)
    assert found["effect"] > found["control"] + 0.1
    assert found["effect"] > found["plain"] + 0.2
