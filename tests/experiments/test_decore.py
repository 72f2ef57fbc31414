from __future__ import annotations

from experiments import decore


def test_retrieval_heads_do_more_than_others() -> None:
    found = decore.measure(0)
    assert found["effect"] > found["control"] + 0.1
    assert found["effect"] > found["plain"] + 0.2
    assert found["zeroed"] > found["zeroed, other heads"] + 0.1
