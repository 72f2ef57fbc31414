from __future__ import annotations

from experiments import lookback_lens


def test_the_detector_chooses_what_repeats_the_context() -> None:
    found = lookback_lens.measure(1)
    assert found["auroc"] > 0.75
    assert found["effect"] > found["control"] + 0.1
