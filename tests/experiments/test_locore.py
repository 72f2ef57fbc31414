from __future__ import annotations

from experiments import locore


def test_recent_tokens_beside_older_ones() -> None:
    found = locore.measure(0)
    assert found["effect"] > found["control"] + 0.0005
