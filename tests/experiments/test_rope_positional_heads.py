from __future__ import annotations

from experiments import rope_positional_heads


def test_the_decoder_copies_from_both_distances() -> None:
    """Whether its positional head matters more than another is recorded, not taken for granted."""
    found = rope_positional_heads.measure(0)
    assert found["plain"] < 0.5
    assert found["plain, near"] < 0.5
    assert found["best score"] > found["second score"]
    assert found["effect"] > 0
