from __future__ import annotations

import pytest

from experiments import found_in_the_middle as middle


def test_the_right_document_is_found_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middle, "ROWS", 12)
    found = middle.measure(1)
    assert found["recall_calibrated"] > found["recall_raw"] + 0.2
    assert found["recall_calibrated"] > found["recall_elsewhere"] + 0.2
    assert found["curve_calibrated"] < found["curve_raw"]
    assert found["accuracy_calibrated"] >= found["accuracy_plain"]
