from __future__ import annotations

from pathlib import Path

from experiments import streaming_llm


def test_the_first_token_beside_a_window(stories: Path) -> None:
    found = streaming_llm.measure(0)
    assert found["effect"] > found["control"] + 0.003
    assert found["effect"] < 0
