from __future__ import annotations

import pytest

from experiments import split_softmax_instruction_drift as drift


def test_a_long_dialogue_is_led_back_to_its_system_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drift, "ROWS", 32)
    monkeypatch.setattr(drift, "POWERS", (0.5, 0.1))
    found = drift.measure(0)
    assert found["long"] < found["short"] - 1.0  # there is something to win
    assert found["effect"] > 1.0
    assert found["effect"] > found["control"] + 1.0
    assert found["short_effect"] > -0.1
