"""The fused operators of GPUs: what they are given, held against operators that act as they do.

There is no GPU here: the operators themselves are replaced by ones in plain PyTorch that insist on
what the real ones want (formats, steps, lengths), and answer nonsense where the real ones may. What
is called, and the shapes that come back, are checked by PyTorch on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.lowering import flash, flash_gpu, flash_probe, flash_tiles, plain

HALF = (torch.float16, torch.bfloat16)


def _seen(mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> Tensor:
    whole = torch.zeros(*query.shape[:3], key.shape[2]) if mask is None else mask.clone()
    if causal:
        late = torch.ones(whole.shape[-2:], dtype=torch.bool).triu_(1)
        whole = whole.masked_fill(late, -torch.inf)
    return whole


def _even(*tensors: Tensor) -> None:
    for tensor in tensors:
        assert tensor.shape[-1] % 8 == 0
        assert tensor.stride(-1) == 1
        assert all(s % 8 == 0 for s in tensor.stride()[:3])


def _readable(mask: Tensor | None, query: Tensor, key: Tensor) -> None:
    if mask is None:
        return
    assert mask.dtype == query.dtype == torch.float32
    assert mask.shape == (*query.shape[:3], key.shape[2])
    assert mask.stride(-1) == 1
    assert mask.storage_offset() % 8 == 0
    assert all(s % 8 == 0 for s, n in zip(mask.stride()[:3], mask.shape, strict=False) if n > 1)


class Operators:
    """The four, in plain PyTorch. `calls` names those that ran."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.strict = True

    def flash_forward(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float):
        self.calls.append("flash")
        assert query.dtype in HALF
        assert not causal or query.shape[2] == key.shape[2]
        _even(query, key, value)
        return plain.forward(query, key, value, _seen(None, causal, query, key), scale)

    def flash_backward(self, grad, query, key, value, out, lse, causal, scale):
        _even(grad, query, key, value, out)
        delta = (grad.float() * out.float()).sum(-1)
        mask = _seen(None, causal, query, key)
        found = plain.backward(query, key, value, mask, scale, lse, delta, grad)
        return tuple(t.to(query.dtype) for t in found[:3])

    def efficient_forward(self, query, key, value, mask, causal, scale):
        self.calls.append("efficient")
        assert query.shape[:2] == key.shape[:2]
        assert query.shape[0] <= flash_tiles.UNITS
        _even(query, key, value)
        if self.strict:
            _readable(mask, query, key)
        out, lse = plain.forward(query, key, value, _seen(mask, causal, query, key), scale)
        nothing = lse == -torch.inf
        return out.masked_fill(nothing[..., None], torch.nan), lse.masked_fill(nothing, torch.nan)

    def efficient_backward(self, grad, query, key, value, out, lse, mask, causal, scale):
        _even(grad, query, key, value, out)
        if self.strict:
            _readable(mask, query, key)
            assert torch.isfinite(lse).all()
        delta = (grad * out).sum(-1)
        seen = _seen(mask, causal, query, key)
        return plain.backward(query, key, value, seen, scale, lse, delta, grad)[:3]


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> Operators:
    """Every call of the fused operator goes the way it goes on a GPU."""
    made = Operators()
    for name in ("flash_forward", "flash_backward", "efficient_forward", "efficient_backward"):
        monkeypatch.setattr(flash_gpu, name, getattr(made, name))
    monkeypatch.setattr(flash, "_fused", lambda query: False)
    monkeypatch.setattr(flash_gpu, "takes", lambda query: query.shape[-1] <= 256)
    monkeypatch.setattr(flash_gpu, "works", lambda *given: True)
    monkeypatch.setattr(flash_tiles, "ENTRIES", 3000)  # several tiles
    return made


def problem(
    n: int, m: int, dtype: torch.dtype, size: int = 20, width: int = 20
) -> tuple[Tensor, Tensor, Tensor]:
    query = torch.randn(2, 4, n, size).to(dtype)
    key, value = (torch.randn(2, 2, m, d).to(dtype) for d in (size, width))
    return query, key, value


def masks(n: int, m: int) -> dict[str, Tensor | None]:
    row = torch.randn(2, 1, 1, m)
    row[0, ..., :2] = -torch.inf
    row[1, ..., 3:] = -torch.inf
    dense = torch.randn(1, 4, n, m)
    dense[:, :, 1] = -torch.inf
    table = torch.randn(4, n + m - 1)
    view = table.as_strided((4, n, m), (table.shape[1], 1, 1))
    gone = torch.full((1, 1, 1, m), -torch.inf)
    return {"none": None, "row": row, "dense": dense, "view": view[None], "gone": gone}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [*masks(3, 4)])
def test_values_and_gradients(
    operators: Operators, name: str, causal: bool, dtype: torch.dtype
) -> None:
    limit = 1e-4 if dtype == torch.float32 else 0.06
    for n, m in [(7, 19), (33, 33), (40, 9), (1, 1)]:
        mask = masks(n + 1, m + 3)[name]
        mask = None if mask is None else mask[:, :, : min(n, mask.shape[2]), :m]
        given = [t.requires_grad_() for t in problem(n, m, dtype, 20, 24)]
        out, lse = flash.flash(*given, mask=mask, causal=causal, scale=0.4)
        wide = [t.detach().double().requires_grad_() for t in given]
        score = 0.4 * wide[0] @ plain.repeat_heads(wide[1], 4).mT
        seen = _seen(None, causal, *wide[:2])
        score = score + (seen if mask is None else seen + mask)
        lively = (score > -torch.inf).any(-1)
        score = torch.where(lively[..., None], score, 0.0)
        want = (score.softmax(-1) * lively[..., None]) @ plain.repeat_heads(wide[2], 4)
        want_lse = score.logsumexp(-1)
        assert torch.equal(lse > -torch.inf, lively)
        assert (out.double() - want).abs().max() <= limit
        assert (lse.double() - want_lse)[lively].abs().max() <= limit if lively.any() else True
        step, step_lse = torch.randn(out.shape), torch.randn(lse.shape)
        got = torch.autograd.grad(
            (out.float() * step).sum() + (torch.where(lively, lse, 0.0) * step_lse).sum(), given
        )
        wanted = torch.autograd.grad(
            (want * step).sum() + (torch.where(lively, want_lse, 0.0) * step_lse).sum(), wide
        )
        for a, b in zip(got, wanted, strict=True):
            assert (a.double() - b).abs().max() <= limit * max(1.0, float(b.abs().max()))


def test_the_fast_operator_takes_what_it_can(operators: Operators) -> None:
    for n, m, mask, causal, dtype, want in [
        (8, 8, None, False, torch.bfloat16, "flash"),
        (8, 8, None, True, torch.float16, "flash"),
        (8, 12, None, True, torch.float16, "flash"),  # the keys that are never seen are cut
        (12, 8, None, True, torch.float16, "efficient"),
        (8, 8, torch.zeros(8), False, torch.bfloat16, "efficient"),
        (8, 8, None, False, torch.float32, "efficient"),
    ]:
        operators.calls.clear()
        query, key, value = problem(n, m, dtype)
        flash.flash(query, key, value, mask=mask, causal=causal, scale=1.0)
        assert operators.calls == [want]


@pytest.mark.parametrize("name", ["sdpa", "strided", "tiled", "fold"])
def test_lowerings_on_these_operators(operators: Operators, name: str) -> None:
    n, m = 30, 41
    query, key, value = problem(n, m, torch.float32)
    bias = {
        "sdpa": ab.KeyBias(torch.randn(2, 4, m)),
        "strided": ab.Relative(torch.randn(4, n + m - 1), queries=n, keys=m),
        "tiled": ab.Segments(torch.arange(n) // 9, torch.arange(m) // 9),
        "fold": ab.LowRank(torch.randn(4, n, 3), torch.randn(4, m, 3)),
    }[name]
    out, lse = ab.attention(query, key, value, bias=bias, lowering=name, return_lse=True)
    want, want_lse = ab.attention(
        query, key, value, bias=bias, lowering="reference", return_lse=True
    )
    assert operators.calls
    torch.testing.assert_close(out, want, atol=2e-5, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["row", "dense", "view", "gone"])
def test_rows_without_a_key(name: str, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_tiles, "ENTRIES", 50)
    for n, m in [(7, 19), (19, 7), (1, 3)]:
        mask = masks(n + 1, m + 3)[name]
        assert mask is not None
        mask = mask[:, :, : min(n, mask.shape[2]), :m].expand(2, 4, n, m)
        whole = _seen(mask, causal, torch.empty(2, 4, n, 1), torch.empty(2, 4, m, 1))
        want = (whole == -torch.inf).all(-1)
        assert torch.equal(flash_tiles.without_a_key(mask, causal).expand(2, 4, n), want)


def test_more_batch_elements_than_a_grid_has(
    operators: Operators, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_tiles, "UNITS", 2)
    query, key, value = (torch.randn(5, 2, 6, 8) for _ in range(3))
    mask = torch.randn(5, 1, 6, 6)
    out, lse = flash.flash(query, key, value, mask=mask, scale=0.3)
    want, want_lse = plain.forward(query, key, value, mask, 0.3)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    assert operators.calls == ["efficient"] * 3


# The comparison before the first use ------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "dtype"), [("efficient", torch.float32), ("flash", torch.bfloat16)]
)
def test_right_operators_pass(operators: Operators, route: str, dtype: torch.dtype) -> None:
    assert flash_probe._probed(route, dtype, torch.device("cpu"))


def _ignores_the_mask(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, mask, causal, scale: run(q, k, v, torch.zeros_like(mask), causal, scale)


def _rounds_the_mask(run: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, mask, causal, scale: run(q, k, v, mask.half().float(), causal, scale)


def _counts_from_the_end(run: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(q, k, v, mask, causal, scale):
        if not causal:
            return run(q, k, v, mask, causal, scale)
        late = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        below = torch.zeros(late.shape).masked_fill(
            late.triu(1 + k.shape[2] - q.shape[2]), -torch.inf
        )
        return plain.forward(q, k, v, below if mask is None else below + mask, scale)

    return wrong


def _refuses(run: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(*given):
        raise RuntimeError("no kernel image is available")

    return wrong


@pytest.mark.parametrize(
    "defect", [_ignores_the_mask, _rounds_the_mask, _counts_from_the_end, _refuses]
)
def test_wrong_operators_are_found(
    operators: Operators,
    monkeypatch: pytest.MonkeyPatch,
    defect: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> None:
    def safe(q, k, v, mask, causal, scale):
        if mask is None and defect in (_ignores_the_mask, _rounds_the_mask):
            return operators.efficient_forward(q, k, v, mask, causal, scale)
        return defect(operators.efficient_forward)(q, k, v, mask, causal, scale)

    operators.strict = False
    monkeypatch.setattr(flash_gpu, "efficient_forward", safe)
    assert not flash_probe._probed("efficient", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_gradients_that_do_not_repeat_are_found(
    operators: Operators, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    def noisy(*given):
        found = list(operators.efficient_backward(*given))
        found[which] = found[which] + 1e-7 * torch.randn_like(found[which])
        return found

    monkeypatch.setattr(flash_gpu, "efficient_backward", noisy)
    assert not flash_probe._probed("efficient", torch.float32, torch.device("cpu"))


# The real operators, as far as they go without a GPU --------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_take_these_arguments(
    monkeypatch: pytest.MonkeyPatch, masked: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(flash_gpu, "works", lambda *given: True)
    query, key, value = (t.to("meta") for t in problem(37, 50, dtype))
    mask = torch.zeros(1, 4, 37, 50, device="meta").expand(2, -1, -1, -1) if masked else None
    out, lse = flash_gpu.call(query, key, value, mask, False, 0.5)
    assert (out.shape, out.dtype) == (query.shape, dtype)
    assert (lse.shape, lse.dtype) == (query.shape[:3], torch.float32)
    grads = flash_gpu.call_backward(query, query, key, value, out, lse, mask, False, 0.5)
    assert [t.shape for t in grads] == [query.shape, key.shape, value.shape]
    assert {t.dtype for t in grads} == {dtype}


def test_deterministic_mode_is_left_as_it_was() -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with flash_gpu._repeatable():
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.are_deterministic_algorithms_enabled() == before
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_cudnn_is_never_asked() -> None:
    """Nothing in the room of lowerings goes through PyTorch's own choice of an operator."""
    from pathlib import Path

    for path in Path(flash.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert "F.scaled_dot_product_attention" not in text
        assert "_scaled_dot_product_cudnn" not in text
