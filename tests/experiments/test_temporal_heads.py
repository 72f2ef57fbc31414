from __future__ import annotations

import pytest
import torch

from experiments.temporal_heads import MEASURE, circuits, everything, facts, recalled, train


def test_the_facts_are_as_stated() -> None:
    ids, objects, kinds = everything(0)
    dated, _ = facts(0)
    assert len(ids.unique(dim=0)) == len(ids) == len(objects)
    assert bool((ids[kinds, 1] < 4).all())
    assert bool((ids[~kinds, 1] == 4).all())
    assert all(len(row.unique()) == len(row) for row in dated.flatten(0, 1))
    for circuit in circuits(0):
        clean, other = circuit["clean"]["input_ids"], circuit["corrupted"]["input_ids"]
        column = (clean != other).any(0).nonzero()[:, 0].tolist()
        assert column == ([2] if circuit["time"] is None else [1])
        assert not torch.equal(circuit["answer"], circuit["wrong"])


@pytest.mark.slow
def test_circuits_of_a_trained_model() -> None:
    model = train(0, 200)
    dated, always = recalled(model, 0)
    assert min(dated, always) > 0.9
    scores = MEASURE.measure(model, circuits(0)[::5])
    for circuit in scores.details["circuits"]:
        assert any(child == "logits" for _, child in circuit)
        assert all(score >= 0.1 for score in circuit.values())
