from __future__ import annotations

from experiments import retrieval_heads


def test_retrieval_heads_find_the_needle() -> None:
    found = retrieval_heads.measure(0)
    assert found["plain"] > 0.9
    assert found["best score"] > 0.5
    assert found["effect"] > found["control"]
