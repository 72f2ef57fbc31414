from __future__ import annotations

from experiments import vhr


def test_vision_aware_heads_do_more_than_the_others() -> None:
    found = vhr.measure(0)
    assert found["effect"] > found["control"] + 0.2
    assert found["effect"] > found["plain"] + 0.2
