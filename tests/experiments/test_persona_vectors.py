from __future__ import annotations

from pathlib import Path

from experiments import persona_vectors


def test_a_style_is_told_apart_and_brought_out(stories: Path) -> None:
    found = persona_vectors.measure(0)
    assert found["effect"] > 0.2
    assert found["effect"] > found["control"] + 0.1
    assert found["style_-2"] < found["style_+0"] < found["style_+2"]
    assert found["told_apart"] > 0.9
    assert found["told_apart"] > found["told_apart_random"] + 0.2
