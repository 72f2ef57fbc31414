"""Pair biases of low rank, learned: what they lose is measured, and they are used when asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.fuse import Factors, Learned, modes
from attnbias.fuse.plain.pairformer import Pairformer
from attnbias.fuse.truncation import Truncation


def model() -> Any:
    torch.manual_seed(0)
    made = Pairformer(2, 32, 16, heads=4, pair_heads=2, pair_size=8, dropout=0.0).eval()
    with torch.no_grad():
        for name, one in made.named_parameters():
            if name.endswith(".bias.weight"):
                one.normal_()
    return made


def protein(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, and pairs that are a smooth function of two numbers of each."""
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=gen)
    both = torch.cat([x[:, None].expand(n, n, 2), x[None].expand(n, n, 2)], -1)
    waves = both @ torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    return torch.randn(1, n, 32, generator=gen), torch.sin(waves)[None]


class Exact(nn.Module):
    """Factors that are the bias itself: the entries, and ones on the diagonal."""

    def __init__(self, entries: Tensor) -> None:
        super().__init__()
        self.entries = entries

    def forward(self, queries: Tensor, keys: Tensor) -> ab.Bias:
        return ab.LowRank(self.entries, torch.eye(keys.shape[0]))


def run(made: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad(), modes.taking("fused"):
        return torch.cat([one.flatten() for one in made(*given)])


@pytest.mark.parametrize("ending", [False, True])
def test_factors_that_are_exact_give_the_exact_output(ending: bool) -> None:
    part = model().blocks[0].attention_end if ending else model().blocks[0].attention_start
    z = protein(20, 1)[1]
    mask = torch.ones(1, 20, 20)
    mask[:, :, 17:], mask[:, 17:] = 0, 0
    with torch.no_grad():
        normed = part.norm(z.transpose(1, 2) if ending else z)
        entries = part.bias(normed).permute(0, 3, 1, 2)
    learned = Learned(Exact(entries), 1.0, 1.0, 0.0, 1.0)
    factors = Factors("", 20, {"": learned})
    with torch.no_grad():
        for given in (None, mask):
            wanted = part(z, given)
            fused = ab.fuse(part, quiet=True, measure=False, factors=factors)
            with fused, modes.taking("fused"), modes.recording() as seen:
                found = part(z, given)
            real = slice(0, 17)
            off = (found - wanted)[:, real, real].abs().max() / wanted.abs().max()
            assert off <= 1e-5
            assert all("LowRank" in bias for bias, _ in seen)
    assert "approximate: rank 20 for 1 of 1" in str(fused)


@pytest.fixture(scope="module", params=["svd", "networks"])
def learned(request: pytest.FixtureRequest) -> tuple[Any, Factors]:
    made = model()
    data = [protein(40, seed) for seed in range(10, 15)]
    return made, ab.fuse.learn(  # type: ignore[attr-defined]
        made, data, rank=8, route=request.param, steps=300, hidden=64, quiet=True
    )


def test_what_is_lost_is_said(learned: tuple[Any, Factors]) -> None:
    _, factors = learned
    assert len(factors.sites) == 4
    for name, one in factors.sites.items():
        assert name in str(factors)
        if isinstance(one.networks, Truncation):
            assert one.best_held - 5e-3 < one.kept_held <= one.best_held + 1e-5
            assert 0 < one.output_held < 1
        else:
            assert one.kept > 0.7
            assert 0 < one.kept_held < one.best_held <= 1.0


def test_they_are_nearer_than_no_bias(learned: tuple[Any, Factors]) -> None:
    made, factors = learned
    given = protein(40, 7)
    exact = run(made, given)
    with ab.fuse(made, quiet=True, measure=False, factors=factors):
        found = run(made, given)
    with ab.fuse(made, quiet=True, measure=False):
        assert torch.allclose(run(made, given), exact, atol=1e-4)
    zeros = Factors(
        "", 8,
        {name: Learned(Exact(torch.zeros(1, 2, 40, 40)), 0, 0, 1, 1) for name in factors.sites},
    )  # fmt: skip
    with ab.fuse(made, quiet=True, measure=False, factors=zeros):
        bare = run(made, given)
    single = isinstance(next(iter(factors.sites.values())).networks, Truncation)
    assert 0 < (found - exact).norm() < (0.3 if single else 0.8) * (bare - exact).norm()


def test_gradients_are_exact(learned: tuple[Any, Factors]) -> None:
    made, factors = learned
    given = protein(24, 3)
    found = []
    for fused in (None, factors):
        made.zero_grad()
        with ab.fuse(made, quiet=True, measure=False, factors=fused), modes.taking("fused"):
            made(*given)[1].square().sum().backward()
        found.append(made.blocks[0].attention_start.bias.weight.grad.clone())
    assert torch.equal(*found)


def test_undone_and_refused(learned: tuple[Any, Factors]) -> None:
    made, factors = learned
    part = made.blocks[0].attention_start
    before, keys = dict(vars(part)), list(made.state_dict())
    with ab.fuse(made, quiet=True, measure=False, factors=factors):
        assert vars(part) != before
        assert list(made.state_dict()) == keys
    assert vars(part) == before
    with pytest.raises(Refused, match="does not have or does not fuse"):
        ab.fuse(made.blocks[0], quiet=True, measure=False, factors=factors)
    assert vars(part) == before
    with pytest.raises(Refused, match="no triangle attention whose name has 'nowhere'"):
        ab.fuse.learn(made, [protein(9, 0)], rank=2, modules="nowhere")  # type: ignore[attr-defined]
    with pytest.raises(AttnbiasError, match="at least one call"):
        ab.fuse.learn(made, [], rank=2)  # type: ignore[attr-defined]
    mask = torch.ones(1, 9)
    mask[:, 7:] = 0
    with pytest.raises(AttnbiasError, match="without padding"):
        ab.fuse.learn(made, [(*protein(9, 0), mask)], rank=2)  # type: ignore[attr-defined]
    assert not made.blocks[0].attention_start._forward_pre_hooks
    with pytest.raises(AttnbiasError, match="route must be"):
        ab.fuse.learn(made, [protein(9, 0)], rank=2, route="best")  # type: ignore[attr-defined]
    with pytest.raises(AttnbiasError, match="rank must be"):
        ab.fuse.learn(made, [protein(9, 0)], rank=0)  # type: ignore[attr-defined]


def test_a_truncation_of_full_rank_is_exact_and_draws_nothing() -> None:
    part = model().blocks[1].attention_end
    z = protein(20, 1)[1]
    mask = torch.ones(1, 20, 20)
    mask[:, :, 17:], mask[:, 17:] = 0, 0
    factors = Factors("", 20, {"": Learned(Truncation(20), 1.0, 1.0, 0.0, 1.0)})
    state = torch.get_rng_state()
    with torch.no_grad(), modes.taking("fused"):
        for given in (None, mask):
            wanted = part(z, given)
            with ab.fuse(part, quiet=True, measure=False, factors=factors):
                found = part(z, given)
            off = (found - wanted)[:, :17, :17].abs().max() / wanted.abs().max()
            assert off <= 1e-5
    assert torch.equal(state, torch.get_rng_state())
