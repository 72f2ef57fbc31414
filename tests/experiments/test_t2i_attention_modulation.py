"""Blobs read less of each other's words than under edits of the same size."""

from __future__ import annotations

import pytest

from experiments.t2i_attention_modulation import measure


def test_the_leak_falls() -> None:
    found = measure(0)
    assert found["effect"] > found["control"] + 0.05
    assert found["leak modulated"] < found["leak plain"] / 2
    assert found["map moved (sharpened)"] == pytest.approx(found["map moved (modulated)"], rel=0.01)
