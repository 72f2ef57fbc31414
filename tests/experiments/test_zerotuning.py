from __future__ import annotations

from pathlib import Path

from experiments import zerotuning


def test_token_0_gains_more_than_other_early_tokens(stories: Path) -> None:
    found = zerotuning.measure(0)
    assert found["effect"] > 0.03
    assert found["effect"] > found["control"] + 0.01
    assert found["factor"] < 1
