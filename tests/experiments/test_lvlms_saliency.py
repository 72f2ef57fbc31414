from __future__ import annotations

from experiments import lvlms_saliency


def test_saliency_does_not_tell_corrupted_tokens_apart_here() -> None:
    """The claim does not hold on this decoder, and the catalogue says so."""
    found = lvlms_saliency.measure(1)
    assert abs(found["effect"] - 0.5) < 0.15
    assert abs(found["control"] - 0.5) < 0.15
