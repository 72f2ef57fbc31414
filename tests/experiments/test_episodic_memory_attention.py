from __future__ import annotations

import pytest

from experiments._induction import decoder, train
from experiments.episodic_memory_attention import ahead, recall, without


@pytest.mark.slow
def test_lag_one_comes_with_training_and_goes_with_its_heads() -> None:
    model = decoder(1, 3, 4)
    before = recall(model.eval())
    train(model, 1, 300)
    scores = recall(model)
    assert ahead(before) < 0.05
    assert ahead(scores) > 0.5
    lags = scores.details["lags"]
    said = scores.details["said"]
    assert int(said.argmax()) == lags.index(1)
    assert float(scores.details["asymmetry"].max()) > 0.3
    assert float(scores.details["contiguity"].max()) > 0.1
    top = scores.top(4)
    assert ahead(without(model, top)) < 0.1
    assert ahead(without(model, scores.others(top, 0))) > 0.2
