"""The statistics kernel against whole maps in float64, interpreted where there is no GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.bias import Bias

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.kernels import configs, statistics_pass
from attnbias.kernels.statistics_pass import Found, Wanted, log_sum_exp
from attnbias.lowering import triton_parts
from attnbias.lowering.problem import Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCALE = 0.3


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def biases(batch: int, heads: int, n: int, m: int) -> dict[str, Bias]:
    ids = torch.arange(m, device=DEVICE) // 9
    keep = torch.ones(batch, m, dtype=torch.bool, device=DEVICE)
    keep[:, : m // 5] = False
    causal = ab.Causal(n, m, device=DEVICE)
    relative = ab.Relative(draw(heads, n + m - 1), queries=n, keys=m)
    return {
        "causal": causal,
        "window": ab.Window(7, 3, queries=n, keys=m, device=DEVICE),
        "key": ab.KeyBias(draw(batch, heads, m)),
        "hidden keys": ab.KeyBias(torch.where(draw(heads, m) > 1, -torch.inf, 0.0)),
        "relative": relative,
        "low rank": ab.LowRank(draw(heads, n, 3), draw(1, m, 3)),
        "dense": ab.Dense(draw(1, heads, n, m)),
        "packed": ab.Segments(torch.arange(m - n, m, device=DEVICE).clamp_min(0) // 9, ids)
        + causal,
        "padding": ab.Padding(keep) + causal,
        "sum": relative + ab.KeyBias(draw(m)) + ab.Dense(draw(batch, 1, n, m)) + causal,
    }


@dataclass
class Call:
    query: Tensor
    key: Tensor
    bias: Bias | None
    wanted: Wanted
    counted: Tensor

    def run(self) -> Found:
        query, key = self.query, self.key
        given = triton_parts.give(Problem(query, key, key, self.bias, SCALE), self.bias)
        lse = log_sum_exp(query, key, SCALE, given)
        lse = torch.where(self.counted & (lse > -torch.inf), lse, torch.inf)
        return statistics_pass.statistics_pass(query, key, lse, SCALE, given, self.wanted)

    def dense(self) -> Found:
        key = self.key.double().repeat_interleave(self.query.shape[1] // self.key.shape[1], 1)
        scores = SCALE * (self.query.double() @ key.mT)
        if self.bias is not None:
            scores = scores + self.bias.dense().double()
        p = scores.softmax(-1).nan_to_num(0.0) * self.counted[..., None]
        wanted = self.wanted
        assert wanted.query_positions is not None
        assert wanted.key_positions is not None
        assert wanted.features is not None
        far = wanted.query_positions[:, :, None] - wanted.key_positions[:, None]
        weight, place = p.sort(dim=-1, descending=True, stable=True)
        weight, place = weight[..., : wanted.top], place[..., : wanted.top]
        return Found(
            p.sum(-2),
            -torch.xlogy(p, p).sum(-1),
            (p * far.abs()[:, None]).sum(-1),
            weight,
            torch.where(weight > 0, place, -1),
            p @ wanted.features[:, None].double(),
        )


def call(
    name: str,
    *,
    batch: int = 1,
    heads: int = 2,
    groups: int = 1,
    n: int = 75,
    m: int = 83,
    size: int = 20,
    features: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Call:
    counted = torch.rand(batch, heads, n, device=DEVICE) > 0.1
    wanted = Wanted(
        received=True,
        inner=True,
        gap=True,
        top=3,
        features=(draw(batch, m, features) > 0).float(),
        query_positions=torch.randint(0, 50, (batch, n), device=DEVICE),
        key_positions=torch.randint(0, 50, (batch, m), device=DEVICE),
    )
    return Call(
        2 * draw(batch, heads, n, size).to(dtype),
        draw(batch, groups, m, size).to(dtype) + 1,
        None if name == "none" else biases(batch, heads, n, m)[name],
        wanted,
        counted,
    )


def close(got: Tensor | None, want: Tensor | None, tolerance: float = 1e-5) -> None:
    assert got is not None
    assert want is not None
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs() / want.double().abs().clamp_min(1)
    assert float(error.max()) <= tolerance


def agree(got: Found, want: Found) -> None:
    for name in ("received", "inner", "gap", "weight", "means"):
        close(getattr(got, name), getattr(want, name))
    assert got.place is not None
    assert want.place is not None
    assert torch.equal(got.place, want.place)


@pytest.mark.parametrize("name", ["none", *biases(1, 1, 1, 1)])
def test_agrees_with_the_whole_map(name: str) -> None:
    one = call(name)
    got, want = one.run(), one.dense()
    agree(got, want)
    if one.bias is not None:
        bare = dataclasses.replace(one, bias=None).run()
        assert (bare.received - got.received).abs().max() > 1e-2
        assert (bare.inner - got.inner).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "relative", "key"])
def test_half_formats_lose_nothing(name: str, dtype: torch.dtype) -> None:
    one = call(name, dtype=dtype, size=32)
    agree(one.run(), one.dense())


@pytest.mark.parametrize(
    "shape",
    [
        {"n": 1, "m": 3},
        {"n": 1, "m": 70},
        {"n": 70, "m": 3},
        {"n": 3, "m": 129, "heads": 6, "groups": 3},
        {"n": 40, "m": 40, "batch": 3, "groups": 2, "size": 3},
        {"n": 200, "m": 33, "heads": 1, "size": 70},
        {"n": 33, "m": 40, "features": 70, "size": 16},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["none", "sum"])
def test_shapes(name: str, shape: dict[str, int]) -> None:
    one = call(name, **shape)
    agree(one.run(), one.dense())


def test_tensors_with_any_strides() -> None:
    one = call("causal", batch=2, groups=2, n=40, m=50)
    want = one.run()
    turned = dataclasses.replace(
        one,
        query=one.query.transpose(1, 2).contiguous().transpose(1, 2),
        key=one.key.mT.contiguous().mT,
    )
    agree(turned.run(), want)


@pytest.mark.parametrize("top", [1, 2, 5, 8])
def test_largest_weights_in_order_and_the_first_of_equal_ones(top: int) -> None:
    one = call("causal", m=75)
    one.query, one.key = one.query.round(), one.key.round()  # products that no order rounds
    one.key[:, :, 40:] = one.key[:, :, 7:42].clone()  # every weight of these keys comes twice
    one.key[:, :, 20] = one.key[:, :, 3]
    one.wanted = dataclasses.replace(one.wanted, top=top)
    agree(one.run(), one.dense())


def test_rows_with_fewer_keys_than_asked_for() -> None:
    one = call("causal", n=20, m=20, heads=1)
    one.wanted = dataclasses.replace(one.wanted, top=8)
    one.counted[:] = True
    found = one.run()
    assert found.place is not None
    assert found.weight is not None
    for row in range(8):
        assert bool((found.place[0, 0, row, row + 1 :] == -1).all())
        assert bool((found.weight[0, 0, row, row + 1 :] == 0).all())
        assert sorted(found.place[0, 0, row, : row + 1].tolist()) == list(range(row + 1))


def test_two_runs_agree_bit_for_bit() -> None:
    one = call("sum", n=130, m=60)
    first, second = one.run(), one.run()
    for name, found in vars(first).items():
        assert torch.equal(found, getattr(second, name)), name


def test_only_what_is_wanted() -> None:
    one = call("causal")
    want = one.dense()
    for name, asked in (
        ("received", Wanted()),
        ("inner", Wanted(False, inner=True)),
        ("weight", Wanted(False, top=3)),
        ("means", Wanted(False, features=one.wanted.features)),
    ):
        one.wanted = asked
        got = one.run()
        close(getattr(got, name), getattr(want, name))
        others = {"received", "inner", "gap", "weight", "place", "means"} - {name}
        others -= {"place"} if name == "weight" else set()
        assert all(getattr(got, other) is None for other in others)


@pytest.mark.parametrize("name", ["none", "window", "padding", "sum", "low rank"])
def test_the_log_sum_exp_alone(name: str) -> None:
    one = call(name)
    given = triton_parts.give(Problem(one.query, one.key, one.key, one.bias, SCALE), one.bias)
    got = log_sum_exp(one.query, one.key, SCALE, given)
    bias = ab.KeyBias(one.query.new_zeros(83)) if one.bias is None else one.bias
    want = ab.attention(
        *(t.double() for t in (one.query, one.key, one.key)),
        bias=bias,
        scale=SCALE,
        lowering="reference",
        return_lse=True,
    )[1]
    assert torch.equal(got == -torch.inf, want == -torch.inf)
    close(got.nan_to_num(neginf=0.0), want.nan_to_num(neginf=0.0))


@pytest.mark.parametrize(("n", "m"), [(8, 3000), (3000, 8)])
def test_long_sums_keep_their_digits(n: int, m: int) -> None:
    """Equal weights: whatever rounding takes from a sum, it takes again and again."""
    query, key = (torch.zeros(1, 1, size, 16, device=DEVICE) for size in (n, m))
    given = triton_parts.give(Problem(query, key, key, None, SCALE), None)
    lse = torch.full((1, 1, n), 2.0, device=DEVICE)
    here, there = (torch.arange(size, device=DEVICE)[None] * 1001 for size in (n, m))
    wanted = Wanted(inner=True, gap=True, query_positions=here, key_positions=there)
    found = statistics_pass.statistics_pass(query, key, lse, SCALE, given, wanted)
    assert found.received is not None
    assert found.gap is not None
    assert found.inner is not None
    weight = float(found.gap[0, 0, 0]) / float((here[0, 0] - there[0]).abs().sum())
    assert weight == pytest.approx(torch.tensor(-2.0).exp().item(), rel=1e-6)
    far = (here[0, :, None] - there).abs().double().sum(-1)
    for got, want in ((found.received, n), (found.inner, 2 * m), (found.gap[0, 0], far)):
        assert float((got.double() / (weight * want) - 1).abs().max()) < 2e-7


@pytest.mark.parametrize(
    "tiles", [(32, 64, 8, 16), (64, 64, 4, 0), (32, 128, 4, 0), (32, 128, 8, 16)], ids=str
)
def test_tiles_of_every_card(
    tiles: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiles that cards are given, and heads that are multiplied in parts."""
    rows, cols, warps, chunk = tiles
    chosen = configs.Config(rows, cols, warps, 1, configs.precision(torch.float32), chunk)
    monkeypatch.setattr(statistics_pass, "config", lambda *_: chosen)
    one = call("sum", n=150, m=140, size=40, heads=1)
    agree(one.run(), one.dense())
