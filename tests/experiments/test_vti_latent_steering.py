from __future__ import annotations

from pathlib import Path

from experiments import vti_latent_steering


def test_the_next_word_of_held_out_prompts_moves(stories: Path) -> None:
    found = vti_latent_steering.measure(0)
    assert found["effect"] > 0.5
    assert found["effect"] > found["control"] + 0.3
    assert found["shift_reversed"] < -0.3
    assert found["shift_doubled"] > found["effect"] + 0.3
