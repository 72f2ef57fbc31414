from __future__ import annotations

import torch

from experiments import paint


def test_the_tokens_of_the_control_are_others() -> None:
    """As many tokens of both kinds, none of them chosen by the vision tower."""
    model = paint.untrained(0)
    images, _ = paint.scenes(4, torch.Generator().manual_seed(0), 0.0)
    chosen = paint.pointed_at(model, images)
    for (local, summary), rule in zip(chosen, paint.elsewhere(model, images, 0), strict=True):
        assert rule.local is not None
        assert rule.summary is not None
        own = set((local | summary).nonzero()[:, 0].tolist())
        drawn = {int(at) - 1 for at in (*rule.local, *rule.summary)}  # type: ignore[call-overload]
        assert not own & drawn
        assert len(rule.local) == int(local.sum())


def test_scenes_break_pairs_when_told() -> None:
    _, names = paint.scenes(40, torch.Generator().manual_seed(1), 0.0)
    pairs = (names // 2).sort(1).values
    assert bool((pairs[:, 1:] != pairs[:, :-1]).all())
    _, names = paint.scenes(40, torch.Generator().manual_seed(1), 1.0)
    pairs = (names // 2).sort(1).values
    assert bool((pairs[:, 1:] == pairs[:, :-1]).any(1).all())
