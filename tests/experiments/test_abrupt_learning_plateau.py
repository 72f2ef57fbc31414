from __future__ import annotations

import pytest
import torch

from attnbias.measures.attention_progress import progress
from experiments._plateau import (
    COUNT,
    MODULUS,
    OUTPUTS,
    Decoder,
    correct,
    moving_sums,
    scaled,
    school,
)
from experiments.abrupt_learning_plateau import TRAININGS, lead, plateau


def test_the_task_and_its_right_entries() -> None:
    rows = moving_sums(5, torch.Generator().manual_seed(0))
    assert rows.shape == (5, 2 * COUNT + 1)
    assert bool((rows[:, COUNT] == MODULUS).all())
    for row in rows.tolist():
        given, said = row[:COUNT], row[COUNT + 1 :]
        assert said[0] == given[0]
        assert said[1:] == [(a + b) % 17 for a, b in zip(given, given[1:])]  # noqa: B905, RUF007
    where = correct()
    assert where[COUNT].nonzero().tolist() == [[0]]
    assert where[COUNT + 3].nonzero().flatten().tolist() == [2, 3]
    assert int(where.sum()) == 1 + 2 * 15 == int(correct(8).sum())
    assert not bool((where & correct(8)).any())
    factors = scaled(10.0)
    assert int((factors == 10).sum()) == 30
    assert bool((factors[COUNT] == 1).all())


def test_the_decoder_is_causal_and_its_map_is_what_it_attends_with() -> None:
    torch.manual_seed(0)
    model = Decoder(16)
    rows = moving_sums(3, torch.Generator().manual_seed(1))[:, :-1]
    factors = scaled(0.2)
    with torch.no_grad():
        whole = model.hidden(rows, factors)
        shown = model.attention.map
        other = rows.clone()
        other[:, 20:] = 1
        assert torch.allclose(model.hidden(other, factors)[:, :20], whole[:, :20], atol=1e-6)
        assert torch.allclose(
            model.hidden(rows, factors, slice(-1, None)), whole[:, -1:], atol=1e-6
        )
        x = model.norms[0](model.tokens(rows) + model.places.weight[:32])
        query, key = model.attention.query(x), model.attention.key(x)
        plain = (query @ key.mT / 4).tril()
    assert torch.allclose(shown, plain * factors, atol=1e-6)
    assert 0 < float(progress(shown[:, None, OUTPUTS], correct()[OUTPUTS]).mean()) < 1


@pytest.mark.slow
def test_a_smaller_model_leaves_the_plateau_sooner_with_the_factor() -> None:
    """Width 128, batches of 64 and a rate of 5e-4: the same shape in less time."""
    small = {"steps": 300, "size": 128, "batch": 64, "rate": 5e-4, "every": 10}
    plain = school(0, scaled(1.0), **small)  # type: ignore[arg-type]
    faster = school(0, scaled(10.0), **small)  # type: ignore[arg-type]
    assert plain.accuracy[-1] > 0.9
    assert plateau(faster) < plateau(plain)
    assert lead(plain) >= 0
    assert max(plain.cosine) > 0.6 > 0.3 > plain.cosine[-1]
    assert plain.progress[-1] > 3 * plain.progress[0]
    assert TRAININGS["1"] == (1.0, 0, 400)
