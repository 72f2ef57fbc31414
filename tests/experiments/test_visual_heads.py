from __future__ import annotations

from experiments import visual_heads


def test_heads_that_look_at_the_image_are_needed() -> None:
    found = visual_heads.measure(2)
    assert found["plain accuracy"] > 0.9
    assert found["effect"] > found["control"] + 0.02
    assert found["rank correlation of 4 and 8 patches"] > 0.7
