"""The forward kernel against float64, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import attnbias as ab
from attnbias.bias import Bias

pytest.importorskip("triton", reason="Triton: an extra where there is no GPU")

from attnbias.kernels import configs, launch
from attnbias.kernels.launch import Given
from attnbias.kernels.places import Places
from tests.kernels.parity import DEVICE, assert_agrees, both, draw, problem

HALF = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


def biases(n: int, m: int, heads: int) -> dict[str, Bias]:
    return {
        "key": ab.KeyBias(draw(2, 1, m)),
        "relative": ab.Relative(draw(heads, n + m - 1), queries=n, keys=m),
        "low rank": ab.LowRank(draw(heads, n, 3), draw(1, m, 3)),
        "dense": ab.Dense(draw(1, heads, n, m)),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*biases(1, 1, 1), "sum"])
def test_structures(name: str, causal: bool) -> None:
    n, m, heads = 37, 50, 4
    each = biases(n, m, heads)
    bias = sum(each.values()) if name == "sum" else each[name]
    assert isinstance(bias, Bias)
    assert_agrees(problem(n, m, heads, 2, 20, 24), bias, causal=causal)


@pytest.mark.parametrize(
    ("size", "width"),
    [(16, 16), (20, 8), (64, 64), (72, 32), (80, 96), (96, 64), (192, 128), (256, 1)],
)
def test_head_sizes(size: int, width: int) -> None:
    n, m, heads = 33, 65, 2
    bias = ab.LowRank(draw(heads, n, 5), draw(heads, m, 5))
    assert_agrees(problem(n, m, heads, 1, size, width, batch=1), bias, causal=True)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("size", [32, 64, 96])
def test_half_precision(dtype: torch.dtype, size: int) -> None:
    n, m, heads = 40, 70, 2
    query, key, value = (t.to(dtype) for t in problem(n, m, heads, 2, size, 24))
    bias = ab.Relative(3 * draw(heads, n + m - 1), queries=n, keys=m)
    bias = bias + ab.LowRank(draw(heads, n, 2), draw(heads, m, 2))
    assert_agrees((query, key, value), bias, atol=HALF[dtype], causal=True)


@pytest.mark.parametrize(("n", "m"), [(17, 129), (64, 64), (65, 31), (96, 33), (100, 1)])
@pytest.mark.parametrize("bare", [False, True])
def test_lengths(n: int, m: int, bare: bool) -> None:
    bias = None if bare else ab.KeyBias(draw(m))
    out, lse, want, logs = both(problem(n, m, 2, 2, 16, 16, batch=1), bias, causal=True)
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse.double(), logs.double(), atol=2e-5, rtol=0)


@pytest.mark.parametrize("offset", [-20, 0, 13, 200])
def test_causal_with_an_offset(offset: int) -> None:
    given = problem(70, 90, 2, 1, 16, 16)
    bias = ab.KeyBias(draw(90))
    out = assert_agrees(given, bias, causal=True, offset=offset, bare={})
    if offset == -20:
        assert bool((out[:, :, :20] == 0).all())


@pytest.mark.parametrize(("before", "after"), [(9, 0), (40, 0), (5, 7), (0, 0)])
def test_windows(before: int, after: int) -> None:
    n = m = 130
    bias = ab.Window(before, after, queries=n, keys=m)
    assert_agrees(problem(n, m, 2, 2, 16, 16, batch=1), bias)
    assert_agrees(problem(n, m, 2, 2, 16, 16, batch=1), bias + ab.KeyBias(draw(2, m)))


@pytest.mark.parametrize("left_side", [False, True])
def test_padding(left_side: bool) -> None:
    n, m = 60, 100
    lengths = torch.tensor([100, 37], device=DEVICE)
    keep = torch.arange(m, device=DEVICE)[None] < lengths[:, None]
    bias = ab.Padding(keep.flip(-1) if left_side else keep)
    assert_agrees(problem(n, m, 2, 1, 16, 16), bias)
    assert_agrees(problem(n, m, 2, 1, 16, 16), bias + ab.KeyBias(draw(m)), causal=True)


def test_padding_with_gaps() -> None:
    keep = torch.ones(2, 90, dtype=torch.bool, device=DEVICE)
    keep[0, 5:50] = False
    keep[1, ::3] = False
    assert_agrees(problem(60, 90, 2, 1, 16, 16), ab.Padding(keep))


def test_packed_segments() -> None:
    lengths = [5, 60, 1, 47, 30]
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths)).to(DEVICE)
    n = len(ids)
    bias = ab.Segments(ids, ids)
    assert_agrees(problem(n, n, 2, 1, 16, 16), bias)
    relative = ab.Relative(draw(2, 2 * n - 1), queries=n, keys=n)
    assert_agrees(problem(n, n, 2, 1, 16, 16), bias + relative, causal=True)


def test_segments_of_each_batch_element_and_queries_of_none() -> None:
    n, m = 70, 90
    key_ids = torch.stack([torch.arange(m) // 30, torch.where(torch.arange(m) < 50, 4, 2)]).to(
        DEVICE
    )
    query_ids = torch.stack([torch.arange(n) % 4, torch.arange(n) // 30 + 2]).to(DEVICE)
    out = assert_agrees(problem(n, m, 2, 2, 16, 16), ab.Segments(query_ids, key_ids))
    assert bool((out[0, :, 3::4] == 0).all()), "no key has that id"


def test_rows_that_see_nothing() -> None:
    n, m = 50, 70
    dense = draw(1, 1, n, m)
    dense[:, :, 10:20] = -torch.inf
    given = problem(n, m, 2, 1, 16, 16)
    out, lse, want, _ = both(given, ab.Dense(dense))
    torch.testing.assert_close(out.double(), want, atol=2e-5, rtol=0)
    assert bool((out[:, :, 10:20] == 0).all())
    assert bool((lse[:, :, 10:20] == -torch.inf).all())


@pytest.mark.parametrize(("n", "m", "width"), [(0, 9, 4), (9, 0, 4), (9, 7, 0), (0, 0, 4)])
def test_empty_lengths(n: int, m: int, width: int) -> None:
    out, lse, want, logs = both(problem(n, m, 2, 1, 16, width), None)
    assert out.shape == want.shape
    assert torch.equal(out.double(), want)
    torch.testing.assert_close(lse.double(), logs.double(), atol=2e-5, rtol=0)


def test_views_are_read_as_they_are() -> None:
    n, heads, size = 40, 3, 16
    packed = draw(2, n, 3, heads, size)
    query, key, value = (packed[:, :, part].transpose(1, 2) for part in range(3))
    bias = ab.Relative(draw(heads, 2 * n - 1), queries=n, keys=n)
    out = assert_agrees((query, key, value), bias)
    assert torch.equal(out, assert_agrees(tuple(t.contiguous() for t in (query, key, value)), bias))
    far = draw(2, heads, size, n).transpose(2, 3)  # features far apart
    assert_agrees((far, key, value), bias)


@pytest.mark.parametrize("scale", [0.25, 0.3, 0.0, -0.5])
@pytest.mark.parametrize("ranked", [False, True])
def test_scales(scale: float, ranked: bool) -> None:
    n, m = 33, 40
    bias = ab.LowRank(draw(2, n, 2), draw(2, m, 2)) if ranked else ab.Causal(n, m)
    assert_agrees(problem(n, m, 2, 2, 16, 16), bias, scale=scale)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_broadcast_of_batch_and_heads(shape: tuple[int, int]) -> None:
    n, m = 40, 45
    given = problem(n, m, 2, 1, 16, 16)
    assert_agrees(given, ab.Dense(draw(*shape, n, m)))
    assert_agrees(given, ab.KeyBias(draw(*shape, m)))
    if shape[0] == 1:
        assert_agrees(given, ab.Relative(draw(shape[1], n + m - 1), queries=n, keys=m))


@pytest.mark.parametrize("causal", [False, True])
def test_dropout_has_the_pattern_of_the_other_lowerings(causal: bool) -> None:
    given = problem(40, 50, 4, 2, 16, 16)
    bias = ab.KeyBias(draw(50))
    found = [
        ab.attention(
            *given, bias=bias, causal=causal, dropout=0.4, return_lse=True, lowering=name,
            generator=torch.Generator().manual_seed(3),
        )
        for name in ("triton", "stream")
    ]  # fmt: skip
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=0)


def test_two_runs_agree_bit_for_bit() -> None:
    given = problem(90, 100, 2, 1, 16, 16)
    bias = ab.KeyBias(draw(100))
    one, two = (ab.attention(*given, bias=bias, causal=True, lowering="triton") for _ in range(2))
    assert isinstance(one, torch.Tensor)
    assert isinstance(two, torch.Tensor)
    assert torch.equal(one, two)


@pytest.mark.parametrize("n", [1, 40])
def test_heads_farther_apart_than_32_bits_reach(n: int) -> None:
    m, size, far = 50, 16, 2**31 + 8
    room = torch.empty(far + 4096, dtype=torch.float16, device=DEVICE)  # pages left untouched
    key = room.as_strided((1, 2, m, size), (2 * far, far, size, 1))
    key.copy_(draw(1, 2, m, size))
    query, _, value = (t.half() for t in problem(n, m, 2, 2, size, size, batch=1))
    assert_agrees((query, key, value), ab.KeyBias(draw(2, m)), atol=4e-3)


def test_programs_beyond_what_two_dimensions_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """65,535 is the most in any dimension of a grid but the first."""
    grids: list[tuple[int, ...]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **options: None

    monkeypatch.setattr(launch, "forward", Recorder())
    given = Given((), (), None, 0, Places(0, 0, None, None, 0), 0, False, None)
    query = torch.empty(300, 300, 100, 16, device=DEVICE)
    launch.forward_pass(query, query, query, 0.25, given)
    config = configs.choose("forward", torch.float32, 16, 16, 0)
    assert grids == [(-(-100 // config.rows) * 90_000,)]


@torch.inference_mode()
def test_padding_and_segments_made_in_inference() -> None:
    """Tensors that do not count their changes are looked at each time."""
    query, key, value = problem(9, 9, 2, 2, 16, 16)
    keep = torch.tensor([[True] * 6 + [False] * 3, [False] * 2 + [True] * 7], device=DEVICE)
    ids = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2], device=DEVICE)
    bias = ab.Padding(keep) + ab.Segments(ids, ids)
    for _ in range(2):
        found = ab.attention(query, key, value, bias=bias, lowering="triton")
        want = ab.attention(query, key, value, bias=bias, lowering="reference")
        assert isinstance(found, torch.Tensor)
        assert isinstance(want, torch.Tensor)
        torch.testing.assert_close(found, want.float(), atol=2e-5, rtol=0)
        keep.copy_(keep.flip(0))
