"""The forms against their papers' numbers and the stock modules."""

from __future__ import annotations

import pytest
import torch

import attnbias as ab


def test_alibi_slopes_are_the_published_ones() -> None:
    want = torch.tensor([2.0**-e for e in range(1, 9)])
    assert torch.equal(ab.forms.alibi_slopes(8), want)
    # Sixteen heads start at 2^-0.5; twelve take eight of eight and four of sixteen.
    torch.testing.assert_close(ab.forms.alibi_slopes(16)[0], torch.tensor(2.0**-0.5))
    twelve = ab.forms.alibi_slopes(12)
    torch.testing.assert_close(twelve[8:], ab.forms.alibi_slopes(16)[0::2][:4])


@pytest.mark.parametrize("heads", [1, 3, 4, 6, 8, 12, 16])
def test_alibi_equals_the_stock_tensor_of_mpt_and_bloom(heads: int) -> None:
    pytest.importorskip("transformers", reason="stock modules: the extra hf is not installed")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    n = 7
    stock = build_alibi_tensor(torch.ones(1, n), heads, torch.float32).reshape(heads, 1, n)
    ours = ab.forms.ALiBi(heads)(1, n, offset=n - 1).dense()[0]
    # Bloom adds slope * j; softmax cannot see the row constant slope * i between the two.
    shift = stock - ours
    torch.testing.assert_close(shift, shift[..., :1].expand_as(shift))


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "far"), [(32, 128), (8, 20), (64, 300)])
def test_t5_equals_the_stock_module(bidirectional: bool, buckets: int, far: int) -> None:
    pytest.importorskip("transformers", reason="stock modules: the extra hf is not installed")
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(
        d_model=16,
        num_heads=4,
        d_kv=4,
        relative_attention_num_buckets=buckets,
        relative_attention_max_distance=far,
        is_decoder=not bidirectional,
    )
    stock = T5Attention(config, has_relative_attention_bias=True)
    with torch.no_grad():
        stock.relative_attention_bias.weight.normal_()
        want = stock.compute_bias(700, 900)
        table = stock.relative_attention_bias.weight
        form = ab.forms.T5(
            4, buckets=buckets, max_distance=far, bidirectional=bidirectional, table=table
        )
        # The stock encoder counts both from 0.
        got = form(700, 900, offset=0).dense()
    assert torch.equal(got, want)
    assert want.std() > 0.5


@pytest.mark.parametrize("form", [ab.forms.ALiBi(3), ab.forms.T5(3, table=torch.randn(32, 3))])
def test_slices_of_a_form_are_the_form_at_an_offset(form) -> None:
    whole = form(20, 20)
    step = whole[..., 12:15, 0:15]
    assert torch.equal(step.dense(), form(3, 15, offset=12).dense())
    assert torch.equal(step.dense(), form(3, 15).dense())  # aligned to the end by default


def test_gradients_reach_slopes_and_tables() -> None:
    slopes = ab.forms.alibi_slopes(2).double().requires_grad_()
    table = torch.randn(32, 2, dtype=torch.float64, requires_grad=True)
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))

    def run(slopes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        bias = ab.forms.ALiBi(2, slopes=slopes)(6) + ab.forms.T5(2, table=table)(6)
        return ab.attention(q, k, v, bias=bias, causal=True, lowering="tiled")

    assert torch.autograd.gradcheck(run, (slopes, table))
