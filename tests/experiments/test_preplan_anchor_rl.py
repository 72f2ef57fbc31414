from __future__ import annotations

from pathlib import Path

from experiments import preplan_anchor_rl


def test_anchors_matter_more_for_what_follows(stories: Path) -> None:
    found = preplan_anchor_rl.measure(0)
    assert found["effect"] > 2 * found["control"]
    assert found["effect"] > found["drawn"]
