"""The plain output of some rows and heads is that of the whole call, bit for bit, for less work."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.hub import stock
from attnbias.lowering import flash
from tests.steer import models


def llama(heads: int = 4, groups: int = 2, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16 * heads,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=16,
        max_position_embeddings=8192,
        **more,
    )
    return models.redraw(LlamaForCausalLM(config)).eval()


class Area:
    """Scores that the operator is asked for."""

    def __init__(self) -> None:
        self.scores = 0
        self.real = flash.call

    def __call__(self, query: Tensor, key: Tensor, *rest: Any) -> Any:
        self.scores += query.shape[1] * query.shape[2] * key.shape[2]
        return self.real(query, key, *rest)


@torch.no_grad()
@pytest.mark.parametrize("length", [1536, 2048, 2500])
@pytest.mark.parametrize("chosen", ["early rows", "odd heads", "mixed"])
def test_parts_are_the_whole_bit_for_bit(length: int, chosen: str) -> None:
    """For what a rule leaves alone: rows before a span, heads, both at once."""
    assert stock.whole_blocks()
    model = llama()
    ids = models.tokens(1, length) % 50
    needed = torch.zeros(1, 4, length, dtype=torch.bool)
    if chosen != "odd heads":
        needed[:, :, : length // 5] = True
    if chosen != "early rows":
        needed[:, 1] = True
    seen = []

    class Look:
        role = "edit"

        def begin_forward(self, forward: int) -> None: ...

        def end_forward(self, forward: int) -> None: ...

        @staticmethod
        def compute(call: Any, editors: Any) -> Any:
            area = Area()
            with mock.patch.object(flash, "call", area):
                part = call.plain_where(needed)
            whole = call.plain()
            rows = needed.transpose(1, 2)
            seen.append(area.scores / (4 * length**2))
            assert torch.equal(part[rows], whole[rows])
            assert part is not whole
            return None, None, call, ""

    from attnbias.hub import attach

    with attach(model, Look()):
        model(input_ids=ids)
    (share,) = seen
    assert share < (0.75 if chosen == "mixed" else 0.51)


@torch.no_grad()
@pytest.mark.parametrize("length", [40, 1030, 2048])
def test_a_rule_on_late_keys_leaves_early_rows_as_they_are(length: int) -> None:
    model = llama()
    ids = models.tokens(1, length) % 50
    start = length // 3
    rule = ab.rules.KeyShift(keys=range(start, start + 9), amount=3.0, heads=[0, 3])
    plain = model(input_ids=ids).logits
    with ab.steer(model, rule):
        edited = model(input_ids=ids).logits
    assert torch.equal(edited[:, :start], plain[:, :start])
    assert (edited[:, start:] - plain[:, start:]).abs().max() > 1e-3


@torch.no_grad()
def test_where_the_operator_would_change_bits_all_is_computed() -> None:
    model = llama()
    ids = models.tokens(1, 1536) % 50
    rule = ab.rules.KeyShift(keys=range(900, 909), amount=3.0, heads="all")
    plain = model(input_ids=ids).logits
    with mock.patch.object(stock, "whole_blocks", return_value=False), ab.steer(model, rule):
        edited = model(input_ids=ids).logits
    assert torch.equal(edited[:, :900], plain[:, :900])


def test_this_pytorch_keeps_the_bits_of_whole_blocks() -> None:
    assert stock.whole_blocks()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
def test_some_rows_by_the_models_own_function(padded: bool) -> None:
    """What the description of a call is checked against."""
    model = llama()
    ids = models.tokens(2, 64) % 50
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :9] = 0
    found = []
    real = stock.plain_rows

    def looked(call: Any, rows: Any) -> Any:
        part = real(call, rows)
        assert part is not None
        found.append((part, call.plain_again()[:, list(rows)]))
        return part

    rule = ab.rules.SplitSoftmax(power=0.5, keys=[12], phase="both", heads="all")
    with mock.patch("attnbias.hub.call.plain_rows", looked), ab.steer(model, rule):
        model(input_ids=ids, attention_mask=mask)
    assert found
    for part, whole in found:
        assert part.shape == whole.shape
        real_rows = whole.abs().sum((-1, -2)) > 0
        assert torch.allclose(part[real_rows], whole[real_rows], atol=1e-5)
