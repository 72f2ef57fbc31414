"""`fit_svd`: planted ranks, the three ways to ask for one, and errors that are what they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias import native


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(heads: int = 2, n: int = 40, m: int = 30, rank: int = 3) -> Tensor:
    return normal(heads, n, rank) @ normal(heads, m, rank, seed=1).mT


def test_a_planted_rank_is_found_and_exact() -> None:
    matrix = planted()
    for asked in ({"rank": 3}, {"energy": 1.0}, {"error": 1e-4}):
        fit = ab.fit_svd(ab.Dense(matrix[None]), **asked)
        assert fit.rank == 3, asked
        assert fit.bias.shape == (1, 2, 40, 30)
        assert fit.error_bias < 5e-6
        assert fit.error_output < 5e-6
        assert fit.energy > 1 - 1e-10
        torch.testing.assert_close(fit.bias.dense()[0], matrix, atol=1e-5, rtol=0)


def test_the_error_falls_as_the_discarded_energy_says() -> None:
    """Eckart and Young: what rank R leaves is the sum of the squared singular values after R."""
    matrix = normal(1, 1, 32, 32)
    values = torch.linalg.svdvals(matrix[0, 0].double()).square()
    errors = []
    for rank in (1, 4, 16, 32):
        fit = ab.fit_svd(ab.Dense(matrix), rank=rank)
        assert fit.energy == pytest.approx(float(values[:rank].sum() / values.sum()), abs=1e-6)
        errors.append(fit.error_output)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1 > 1e-5 > errors[-1]


def test_energy_and_error_take_the_smallest_rank_that_holds() -> None:
    bias = ab.Dense(torch.stack([planted(1, rank=2)[0], planted(1, rank=6)[0]])[None])
    some = ab.fit_svd(bias, energy=0.9)
    assert some.energy >= 0.9
    assert ab.fit_svd(bias, rank=some.rank - 1).energy < 0.9
    near = ab.fit_svd(bias, error=0.5)
    assert near.error_bias <= 0.5 + 1e-5
    assert ab.fit_svd(bias, rank=near.rank - 1).error_bias > 0.5


def test_centred_saves_columns_that_folding_does_not_pay_for() -> None:
    """Rows and columns that are constant are two columns, whatever they hold."""
    row, column = 5 * normal(40, 1), 5 * normal(1, 30, seed=1)
    core = planted(1, rank=2)[0] * 0.1
    fit = ab.fit_svd(ab.Dense((core + row + column)[None, None]), error=1e-4, centred=True)
    assert fit.rank == 4
    assert fit.error_bias < 2e-5
    q, k, v = normal(1, 1, 40, 32), normal(1, 1, 30, 32), normal(1, 1, 30, 32)
    fold = next(o for o in ab.explain(q, k, v, bias=fit.bias).offers if o.lowering == "fold")
    assert "2 columns" in fold.reason


def test_errors_on_the_output_are_of_the_tensors_given() -> None:
    q, k, v = (normal(1, 2, n, 8, seed=n).double() for n in (40, 30, 31))
    v = v[:, :, :30]
    matrix = planted()[None]
    fit = ab.fit_svd(ab.Dense(matrix), rank=1, query=q, key=k, value=v, scale=0.3)
    outs = [(q @ k.mT * 0.3 + b.double()).softmax(-1) @ v for b in (matrix, fit.bias.dense())]
    assert fit.error_output == pytest.approx(float((outs[0] - outs[1]).abs().max()), rel=1e-6)
    assert fit.error_bias == pytest.approx(float((fit.bias.dense() - matrix).abs().max()), rel=1e-5)


def test_explain_says_where_the_fit_wins_and_where_not() -> None:
    """A dense matrix is slower than few columns at length; a table by distance is not."""
    q = torch.empty(1, 2, 1024, 64)
    columns = ab.fit_svd(ab.Dense(planted(2, 1024, 1024, 2)[None, :1]), rank=2)
    with native.disabled():
        assert columns.explain(q, q, q)[1].chosen == "fold"
    original, fitted = columns.explain(q, q, q)
    assert (fitted.offers[0].time < original.offers[0].time) == (
        "fitted form wins" in columns.compare(q, q, q)
    )
    short = ab.fit_svd(ab.Dense(planted(1, 64, 64, 2)[None]), rank=2)
    q = torch.empty(1, 1, 64, 64)
    assert "keep it" in short.compare(q, q, q), "columns are not made for 64 tokens"
    table = ab.fit_svd(ab.forms.T5(2, table=normal(32, 2))(64), energy=0.99)
    q = torch.empty(1, 2, 64, 64)
    assert "keep it" in table.compare(q, q, q)


def test_refusals() -> None:
    bias = ab.Dense(planted()[None])
    for words, asked in {
        "exactly one of rank=, energy= and error=, got none of them": {},
        "got rank and energy": {"rank": 1, "energy": 0.5},
        "rank must lie between 0 and 30, got 31": {"rank": 31},
        "energy must be above 0 and at most 1, got 2": {"energy": 2.0},
        "error must be above 0 logits, got 0": {"error": 0.0},
        "query, key and value together, got 1": {"rank": 1, "query": torch.zeros(1, 2, 40, 8)},
    }.items():
        with pytest.raises(ab.AttnbiasError, match=words):
            ab.fit_svd(bias, **asked)
    with pytest.raises(ab.AttnbiasError, match="hides some"):
        ab.fit_svd(bias + ab.Causal(40, 30), rank=2)
    with pytest.raises(ab.AttnbiasError, match="needs no fit"):
        ab.fit_svd(ab.KeyBias(torch.zeros(4)), rank=1)
