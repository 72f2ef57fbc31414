from __future__ import annotations

import pytest

from experiments._induction import decoder, train
from experiments.induction_heads import best, in_context, looked_at


def test_two_layers_learn_what_one_cannot() -> None:
    two, one = train(decoder(0, 2, 4), 0, 200), train(decoder(0, 1, 8), 0, 200)
    scores = looked_at(two)
    assert best(scores) > 0.7
    assert best(looked_at(one)) < 0.2
    heads = scores.above(0.3)
    assert all(layer == 1 for layer, _ in heads)
    assert float(scores.details["copying"][1].max()) > 0.5
    others = scores.others(heads[:4])
    assert in_context(two, heads[:4]) > in_context(two, others) + 1
    assert in_context(two) < in_context(one) - 1


@pytest.mark.slow
def test_smeared_keys_let_one_layer_do_it() -> None:
    smeared = train(decoder(0, 1, 8, smeared=True), 0, 200)
    assert best(looked_at(smeared)) > 0.4
