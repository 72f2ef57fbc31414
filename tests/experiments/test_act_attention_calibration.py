from __future__ import annotations

import pytest

from experiments import act_attention_calibration as act


def test_selected_heads_gain_more_than_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(act, "EXAMPLES", 12)
    found = act.measure(1)
    assert found["effect"] > 0.05
    assert found["effect"] > found["control"]
    assert 0 < found["selected"] < 12
