from __future__ import annotations

from experiments import attentioninfluence


def test_texts_that_repeat_lose_more_without_their_retrieval_head() -> None:
    found = attentioninfluence.measure(0)
    assert found["best score"] > 0.3
    assert found["effect"] > max(0.9, found["control"])
