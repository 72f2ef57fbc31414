"""Zeroing the largest activations of a real decoder harms it more than zeroing others."""

from __future__ import annotations

import pytest

from experiments.massive_activations import measure
from experiments.zerotuning import DATA


@pytest.mark.skipif(
    not (DATA / "stories260K-hf").exists(),
    reason="shared data: no folder ../shared/data beside the repository",
)
def test_the_largest_activations_matter() -> None:
    found = measure(0)
    assert found["effect"] > 3 * max(found["control"], 0.0)
    assert found["to_the_mean"] < found["effect"] / 3
    assert found["share_of_entries"] < 0.02
    assert found["found_by_published_thresholds"] == 0
