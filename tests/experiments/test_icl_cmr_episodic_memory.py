from __future__ import annotations

import pytest
import torch

from experiments._induction import decoder, repeated, train
from experiments.icl_cmr_episodic_memory import in_context, likeness


@pytest.mark.slow
def test_heads_like_cmr_carry_copying() -> None:
    fresh = likeness(decoder(0, 3, 4).eval())
    model = train(decoder(0, 3, 4), 0, 200)
    scores = likeness(model)
    assert float(scores.details["distance"].min()) < 0.05
    assert float(fresh.details["distance"].min()) > 0.05
    ids = repeated(32, torch.Generator().manual_seed(7))
    late = slice(30, None)
    plain = in_context(model, ids, late)
    top = scores.top(4)
    others = in_context(model, ids, late, scores.others(top, 0))
    assert in_context(model, ids, late, top) > max(others, plain) + 1
