"""FlexAttention with functions made from a bias: on a CPU uncompiled, on a GPU compiled.

FlexAttention refuses gradients on a CPU at its door; behind it the backward is there, in plain
PyTorch. The tests of gradients open that door, so that what it is given is tested here, too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import flex_attention as pytorch

import attnbias as ab
from attnbias import kernels
from attnbias.bias import Bias
from attnbias.bias.learned_radial import Radial
from attnbias.bias.radial import RBF, TISA, Exponential, Scalar, Squared
from attnbias.lowering import LOWERINGS, flex, flex_blocks, flex_parts, offers
from attnbias.lowering.problem import Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N, M, HEADS, GROUPS = 37, 50, 4, 2


@pytest.fixture
def backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients on a CPU, too."""
    if DEVICE == "cpu":
        monkeypatch.setattr(flex, "TRAINS", ("cuda", "cpu"))
        monkeypatch.setattr(pytorch, "_validate_device", lambda query, key, value: None)


@pytest.fixture(autouse=True)
def _ready() -> Iterator[None]:
    """Every test makes its functions anew: the door of another may have been open."""
    flex.compiled.cache_clear()
    yield
    flex.compiled.cache_clear()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def among(count: int, *shape: int) -> Tensor:
    return torch.randint(count, shape, device=DEVICE)


def problem(n: int = N, m: int = M, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = ((HEADS, n, 20), (GROUPS, m, 20), (GROUPS, m, 24))
    return [draw(2, *size).to(dtype) for size in sizes]


def _points(radial: Any, **options: Any) -> Bias:
    x = draw(N, 3)
    x[4] = torch.nan  # a missing place
    return ab.Distance(x, draw(2, M, 3), radial, **options)


def _rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (3 * q + k + b) % 4 != 0


def _sphere() -> Bias:
    places = [draw(length, 2) for length in (N, M)]
    places[1][:5] = places[0][:5] + 1e-4  # close by: lost in float32 without the low parts
    return ab.Distance(
        *places, Exponential(draw(HEADS, 2), draw(HEADS, 2).abs()), metric="great_circle"
    )


def _learned_places() -> Bias:
    x, y = draw(N, 2).requires_grad_(), draw(2, M, 2).double().requires_grad_()
    return ab.Distance(x, y, RBF(draw(HEADS, 2), draw(HEADS, 2).abs()))


def _few_vectors() -> Bias:
    return ab.QueryRelative.clipped(draw(HEADS, 9, 20), queries=N, keys=M)


def _turned() -> Bias:
    inner = ab.QueryRelative.clipped(draw(HEADS, 9, 6), queries=M, keys=N)
    return inner.bind(draw(2, HEADS, M, 6)).transpose()


STRUCTURES: dict[str, Callable[[], Bias]] = {
    "key": lambda: ab.KeyBias(draw(2, 1, M)),
    "relative": lambda: ab.Relative(draw(HEADS, N + M - 1), queries=N, keys=M),
    "low rank": lambda: ab.LowRank(draw(HEADS, N, 3), draw(1, M, 3)),
    "dense": lambda: ab.Dense(draw(1, HEADS, N, M)),
    "rows of a dense": lambda: ab.Dense(draw(2, 1, N, 1)) + ab.Dense(draw(1, 1, 1, 1)),
    "buckets": lambda: ab.Bucketed(draw(1, HEADS, 5, 6), among(5, 2, 1, N), among(6, 1, HEADS, M)),
    "rows of a table": lambda: ab.Bucketed(draw(2, 1, N, 6), None, among(6, 1, 1, M)),
    "grid": lambda: ab.GridRelative(draw(HEADS, 7, 13), (4, 7), outside="clamp"),
    "grid with specials": lambda: ab.GridRelative(
        draw(HEADS, 7, 13), (4, 7), specials=draw(HEADS, 3, 2), outside="clamp"
    ),
    "rbf": lambda: _points(RBF(draw(HEADS, 3), draw(HEADS, 3).abs()), weight=draw(HEADS, N)),
    "scalar": lambda: _points(Scalar(draw(HEADS))),
    "squared": lambda: _points(Squared(0.3 * draw(HEADS))),
    "sphere": _sphere,
    "time": lambda: ab.Distance(
        draw(N), draw(M), TISA(draw(1, 2), draw(1, 2).abs(), draw(1, 2)), metric="time", causal=True
    ),
    "learned places": _learned_places,
    "few vectors": _few_vectors,
    "turned": _turned,
}
MASKS: dict[str, Callable[[int, int], Bias]] = {
    "causal": lambda n, m: ab.Causal(n, m),
    "early": lambda n, m: ab.Causal(n, m, offset=-3),  # the first queries see nothing
    "window": lambda n, m: ab.Window(9, 4, queries=n, keys=m),
    "padding": lambda n, m: ab.Padding(torch.arange(m, device=DEVICE) < among(m, 2, 1) + 1),
    "packed": lambda n, m: ab.Segments(among(5, 2, n).sort().values, among(5, 2, m).sort().values),
    "scattered": lambda n, m: ab.Segments(among(3, n), among(3, m)),
    "rule": lambda n, m: ab.MaskFunction(_rule, queries=n, keys=m, batch=2, device=DEVICE),
}


def agree(got: Tensor, want: Tensor, limit: float, words: str) -> None:
    got, want = got.detach(), want.detach()
    error = (got.double() - want).abs().max() if want.numel() else torch.zeros(())
    bound = limit * max(1.0, float(want.abs().max())) if want.numel() else limit
    assert error <= bound, f"{words}: {error:.1e} over {bound:.1e}"


def compare(bias: Bias, *, causal: bool = False, gradients: bool = True) -> None:
    """Values, log-sum-exp and gradients against float64; without the bias all would differ."""
    n, m = bias.queries or N, bias.keys or M
    given = [t.requires_grad_(gradients) for t in problem(n, m)]
    own = [p.detach().clone().requires_grad_(gradients) for p in bias.parameters()]
    wide = [t.detach().double().requires_grad_(gradients) for t in given]
    own_wide = [p.detach().double().requires_grad_(gradients) for p in own]
    out, lse = ab.attention(
        *given, bias=bias.with_parameters(own), causal=causal, lowering="flex", return_lse=True
    )
    want, want_lse = ab.attention(
        *wide,
        bias=bias.with_parameters(own_wide),
        causal=causal,
        lowering="reference",
        return_lse=True,
    )
    seen = want_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    agree(out, want, 1e-5, "output")
    agree(torch.where(seen, lse, 0.0), torch.where(seen, want_lse, 0.0), 1e-5, "lse")
    with torch.no_grad():
        _, bare = ab.attention(*given, causal=causal, return_lse=True)
    apart = (bare - lse)[seen & (bare > -torch.inf)].abs()
    assert not seen.all() or apart.max() > 1e-2, "leaving the bias out must fail this test"
    if not gradients:
        return
    step, step_lse = draw(*out.shape), draw(*lse.shape)
    pairs = []
    for o, s, leaves in ((out, lse, given + own), (want, want_lse, wide + own_wide)):
        total = (o * step).sum() + (torch.where(seen, s, 0.0) * step_lse).sum()
        pairs.append(torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True))
    for place, (a, b) in enumerate(zip(*pairs, strict=True)):
        assert a.dtype == (given + own)[place].dtype
        agree(a, b, 5e-5, f"gradient {place}")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """The gradients of score functions, as FlexAttention has them, one for each call."""
    operator: Any = importlib.import_module("torch._higher_order_ops.flex_attention")
    found: list[torch.fx.GraphModule] = []
    make = operator.create_fw_bw_graph

    def spied(*given: Any) -> Any:
        both = make(*given)
        found.append(both[1])
        return both

    monkeypatch.setattr(operator, "create_fw_bw_graph", spied)
    return found


def read_twice(graph: torch.fx.GraphModule) -> bool:
    """Whether a gradient is a sum over several places of a function: a GPU's kernels refuse it."""
    scatter = torch.ops.flex_lib.zeros_and_scatter.default
    return any(
        node.target is scatter and any(user.op != "output" for user in node.users)
        for node in graph.graph.nodes
    )


@pytest.mark.usefixtures("backward")
@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str, graphs: list[torch.fx.GraphModule]) -> None:
    compare(STRUCTURES[name]())
    if DEVICE == "cpu":
        assert graphs
        assert not any(read_twice(graph) for graph in graphs)


def test_reading_at_two_places_would_be_found(graphs: list[torch.fx.GraphModule]) -> None:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    operator: Any = importlib.import_module("torch._higher_order_ops.flex_attention")
    places = [torch.zeros((), dtype=torch.int, device=DEVICE) for _ in range(4)]
    score = torch.zeros((), device=DEVICE, requires_grad=True)
    for twice in (False, True):

        def mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor, t: Tensor) -> Tensor:
            return score + t[q] + (t[k] if twice else 0.0)  # noqa: B023

        with TransformGetItemToIndex():
            operator.create_fw_bw_graph(mod, (score, *places), (draw(N).requires_grad_(),))
    assert [read_twice(graph) for graph in graphs] == [False, True]


@pytest.mark.usefixtures("backward")
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str) -> None:
    compare(MASKS[name](N, M))


@pytest.mark.parametrize(("kernel", "dilation"), [((3, 3), (1, 1)), ((3, 2), (2, 2))])
def test_neighborhoods(kernel: tuple[int, int], dilation: tuple[int, int]) -> None:
    bias = ab.Neighborhood((7, 6), kernel, dilation=dilation, causal=(False, True))
    compare(bias, gradients=False)
    compare(bias.transpose(), gradients=False)


@pytest.mark.usefixtures("backward")
def test_a_sum_of_everything() -> None:
    parts = [STRUCTURES[n]() for n in ("key", "relative", "low rank", "dense", "rbf")]
    compare(sum(parts[1:], parts[0]) + MASKS["padding"](N, M), causal=True)


def test_parts_of_a_bias() -> None:
    """Decoding, and a block of a larger problem: the same bias at an offset."""
    n, m = N + 9, M + 5
    whole = ab.Relative(draw(HEADS, n + m - 1), queries=n, keys=m) + ab.Causal(n, m)
    whole = whole + ab.MaskFunction(_rule, queries=n, keys=m, device=DEVICE)
    for rows in (slice(11, 12), slice(5, 5 + N)):
        compare(whole[..., rows, 3 : 3 + M], gradients=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_formats(dtype: torch.dtype) -> None:
    given = problem(dtype=dtype)
    bias = STRUCTURES["relative"]() * 3.0
    out, lse = ab.attention(*given, bias=bias, lowering="flex", return_lse=True)
    wide = [t.double() for t in given]
    want, want_lse = ab.attention(*wide, bias=bias, lowering="reference", return_lse=True)
    assert out.dtype == dtype
    agree(out, want, 4e-3 if dtype == torch.float16 else 2e-2, "output")
    agree(lse, want_lse, 1e-4, "lse")  # scores in float32, with the table as it is


def test_nothing_to_compute() -> None:
    for n, m in ((0, 4), (4, 0)):
        query, key, value = problem(n, m)
        out, lse = ab.attention(query, key, value, lowering="flex", return_lse=True)
        assert out.shape == (2, HEADS, n, 24)
        assert not out.any()
        assert (lse == -torch.inf).all()


# Functions are made once for a structure -------------------------------------------------------


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def test_new_tensors_need_no_new_function() -> None:
    # More than one block of keys from the start: one, and one of several, are kinds of their own.
    def run(m: int, offset: int) -> int:
        table = ab.Relative(draw(HEADS, N + m - 1), queries=N, keys=m)
        mask = ab.Causal(N, m, offset=offset) + ab.Segments(among(3, N), among(3, m))
        ab.attention(*problem(N, m), bias=table + mask, lowering="flex")
        return _graphs()

    first = run(140, 107)
    assert run(140, 107) == first
    assert run(140, 103) == first, "another offset is a number, not another structure"
    second = run(300, 107)
    assert second <= first + 1  # now with lengths that change
    assert run(450, 107) == second


def test_another_rule_is_traced_anew_and_one_that_cannot_be_is_refused() -> None:
    compare(MASKS["rule"](N, M), gradients=False)
    other = ab.MaskFunction(lambda b, h, q, k: (q + k) % 3 != 0, queries=N, keys=M, device=DEVICE)
    compare(other, gradients=False)

    def looks_at_values(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k if int(q.max()) >= 0 else q < k

    bias = ab.MaskFunction(looks_at_values, queries=N, keys=M, device=DEVICE)
    with pytest.raises(ab.Refused, match="could not trace"):
        ab.attention(*problem(), bias=bias, lowering="flex")


# Blocks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 450), (128, 256), (1, 700), (131, 5)])
@pytest.mark.parametrize("name", [*MASKS, "neighborhood", "turned neighborhood"])
def test_blocks_that_masks_leave(name: str, size: tuple[int, int]) -> None:
    n, m = size
    bias = MASKS[name](n, m) if name in MASKS else ab.Neighborhood((9, 40), (5, 7))
    if name.startswith("turned"):
        bias = bias.transpose()
    n, m = bias.queries or n, bias.keys or m
    found = flex_blocks.blocks([bias], n, m, torch.device(DEVICE))
    seen = (bias.dense() == 0).expand(-1, 1, n, m).to(DEVICE)
    rows, cols = (-(-length // flex_blocks.SIZE) for length in (n, m))
    pad = (0, cols * flex_blocks.SIZE - m, 0, rows * flex_blocks.SIZE - n)
    parts = torch.nn.functional.pad(seen, pad).unflatten(2, (rows, -1)).unflatten(4, (cols, -1))
    some, every = parts.any(-1).any(3), parts.all(-1).all(3)
    assert (found.possible | ~some).all(), "a block that is seen must be possible"
    assert (every | ~found.whole).all(), "a whole block must be seen as a whole"
    if name in ("causal", "early", "window", "padding", "rule"):
        assert torch.equal(found.possible.expand_as(some), some), "none too many"
        assert torch.equal(found.whole.expand_as(every), every), "none too few"
    lists = flex._lists(found)
    assert all(one.is_contiguous() and one.dtype == torch.int32 for one in lists)
    make: Any = pytorch.BlockMask
    mask = make((n, m), *lists, BLOCK_SIZE=(flex_blocks.SIZE, flex_blocks.SIZE))
    assert torch.equal(mask.to_dense() > 0, found.possible)


def test_blocks_of_packed_sequences_are_skipped() -> None:
    ids = torch.arange(2048, device=DEVICE) // 256
    found = flex_blocks.blocks([ab.Segments(ids, ids)], 2048, 2048, torch.device(DEVICE))
    assert int(found.possible.sum()) == int(found.whole.sum()) == 8 * 4


# Offers ------------------------------------------------------------------------------------------


def test_never_chosen_on_a_cpu() -> None:
    query, key, value = (t.cpu() for t in problem())
    for bias in (
        None,
        ab.KeyBias(torch.randn(M)),
        ab.Relative(torch.randn(N + M - 1), queries=N, keys=M),
    ):
        made = Problem(query, key, value, bias, 0.3)
        found = offers(made)
        assert found[0].lowering != "flex"
        own = next(o for o in found if o.lowering == "flex")
        assert "uncompiled" in own.reason


def test_refusals() -> None:
    query, key, value = problem()
    given = (query, key, value)

    def refused(words: str, **options: Any) -> None:
        with pytest.raises(ab.Refused, match=words):
            ab.attention(*given, lowering="flex", **options)

    refused("drops no weights", dropout=0.1)
    refused("computes no relu weights", normaliser="relu")
    refused("too many terms", bias=ab.LowRank(draw(N, 40), draw(M, 40)))
    full = ab.QueryRelative(draw(N + M - 1, 20), queries=N, keys=M)
    refused("product with the query", bias=full)
    any_function = ab.Distance(draw(N, 2), draw(M, 2), Radial(lambda d: d.sin()[None]))
    refused("given function", bias=any_function)
    with kernels.disabled():
        refused("switched off", bias=ab.KeyBias(draw(M)))


def test_no_gradients_on_a_cpu() -> None:
    query, key, value = (t.cpu() for t in problem())
    with pytest.raises(ab.Refused, match="no gradients on a CPU"):
        ab.attention(query.requires_grad_(), key, value, lowering="flex")


@pytest.mark.usefixtures("backward")
def test_no_gradients_to_places_on_a_sphere() -> None:
    places = draw(N, 2).requires_grad_()
    bias = ab.Distance(places, draw(M, 2), Scalar(draw(HEADS)), metric="great_circle")
    with pytest.raises(ab.Refused, match="sphere"):
        ab.attention(*problem(), bias=bias, lowering="flex")


def test_prices_on_a_gpu() -> None:
    """Offers look at shapes alone, so tensors that only claim to be on a GPU will do."""
    with FakeTensorMode():
        query, key, value = (torch.empty(t.shape, device="cuda") for t in problem())
        wide = torch.empty(2, HEADS, N, 300, device="cuda")
        table = torch.empty(HEADS, N + M - 1)
    bias = ab.Relative(table, queries=N, keys=M)
    plain = LOWERINGS["flex"].answer(Problem(query, key, value, bias, 0.3))
    assert 1.0 < plain.time < 2.0
    learned = ab.Relative(table.requires_grad_(), queries=N, keys=M)
    trained = LOWERINGS["flex"].answer(Problem(query, key, value, learned, 0.3))
    assert trained.time > 10 * plain.time
    assert "not bit for bit" in trained.reason
    double = [t.double() for t in (query, key, value)]
    assert "float64" in LOWERINGS["flex"].answer(Problem(*double, bias, 0.3)).reason
    assert "at most 256" in LOWERINGS["flex"].answer(Problem(wide, wide, wide, bias, 0.3)).reason


def test_every_part_lies_on_the_device_of_the_query() -> None:
    meta = torch.device("meta")
    for make in STRUCTURES.values():
        for term in make().bind(problem()[0]).terms() if make is not _turned else make().terms():
            made = flex_parts.part(term, meta)
            assert {t.device.type for t in made.tensors} == {"meta"}
