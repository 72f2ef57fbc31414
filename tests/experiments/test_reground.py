"""The rewired block shows the prompt's details inside boxes, and as many labels."""

from __future__ import annotations

from experiments.reground import measure


def test_details_come_back_and_labels_stay() -> None:
    found = measure(0)
    assert found["effect"] > found["control"]
    assert found["effect"] > found["details with boxes"]
    assert found["labels rewired"] > found["labels with boxes"] - 0.05
    assert found["labels rewired"] > 0.4  # of four labels and none: the boxes are obeyed
