"""AdaTP keeps what the question is about where attention alone does not, and saves time."""

from __future__ import annotations

from experiments.adatp import EXPERIMENT, measure


def test_both_modules_together_keep_more() -> None:
    found = measure(0)
    assert found["effect"] > found["control"]
    assert found["effect"] > 2 * found["attention alone, 8% kept"]
    assert found["share of keys cached"] < 0.35
    assert found["share of prefill time"] < 0.75
    assert EXPERIMENT.work == "adatp"
