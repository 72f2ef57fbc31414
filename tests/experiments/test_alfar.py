from __future__ import annotations

from experiments import alfar


def test_the_context_is_used_more_than_by_edits_of_drawn_columns() -> None:
    found = alfar.measure(0)
    assert found["plain"] < 0.3  # the decoder answers from memory
    assert found["effect"] > found["control"] + 0.1
    assert found["effect"] > found["plain"] + 0.2
    assert found["effect"] > found["exchanged"] + 0.2
    assert found["reallocation alone"] > found["plain"] + 0.05
