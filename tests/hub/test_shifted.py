"""One call of the model's own operator for biases per key: what they leave alone keeps its bits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.hub import Call, attach, shifted
from attnbias.steer import engine
from attnbias.steer.rules.block_heads import BlockHeads
from tests.cases.rule import Watch
from tests.steer import models

ODD = (1, 3)
KEYS = range(5, 12)


def llama(heads: int = 4, groups: int = 2) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16 * heads,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    return LlamaForCausalLM(config).eval()


def text(length: int, padding: str = "none") -> dict[str, Tensor]:
    mask = torch.ones(2, length, dtype=torch.long)
    if padding != "none":
        mask[1, slice(0, 7) if padding == "left" else slice(-7, None)] = 0
    return {"input_ids": models.tokens(2, length) % 50, "attention_mask": mask}


def both(call: Any) -> tuple[Any, Any, list[bool]]:
    """With the short route, and without; whether the short one was taken."""
    taken: list[bool] = []
    real = engine.shift

    def watched(edit: Any) -> Any:
        found = real(edit)
        taken.append(found is not None)
        return found

    with mock.patch.object(engine, "shift", watched):
        short = call()
    with mock.patch.object(engine, "shift", return_value=None):
        return short, call(), taken


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("length", [40, 300, 1030])
def test_rows_and_heads_left_alone_keep_their_bits(length: int, padding: str) -> None:
    model, inputs = llama(), text(length, padding)
    rule = ab.rules.KeyShift(keys=KEYS, amount=2.0, heads=ODD)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
        assert extra is not None
        if call.site.layer == 0:
            seen.append((output, call.plain_again()))

    def run() -> Tensor:
        with ab.steer(model, rule), attach(model, Watch(look)):
            found: Tensor = model(**inputs).logits
        return found

    short, long, taken = both(run)
    assert all(taken) == (padding != "right")
    real = inputs["attention_mask"].bool()
    assert (short - long)[real].abs().max() < 2e-5 * long[real].abs().max()
    for output, plain in seen:
        assert torch.equal(output[:, :, ::2], plain[:, :, ::2])
        assert not torch.equal(output[:, :, 1], plain[:, :, 1])
        for row, keep in enumerate(real):
            first = int(keep.nonzero()[0]) + KEYS.start
            assert torch.equal(output[row, :first], plain[row, :first])
            assert torch.equal(output[row][~keep], plain[row][~keep])
            assert not torch.equal(output[row, first], plain[row, first])


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("heads", ["all", ODD])
@pytest.mark.parametrize("sizes", [(4, 2), (4, 4), (6, 2), (4, 1)])
def test_one_query(sizes: tuple[int, int], heads: Any, padding: str) -> None:
    """A decoded token against whole rows of weights; heads left alone keep their bits."""
    model, inputs = llama(*sizes), text(40, padding)
    rule = ab.rules.KeyShift(keys=KEYS, amount=2.0, heads=heads)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
        if call.site.layer == 0 and call.phase == "decode":
            seen.append((output, call.plain_again()))

    def run() -> Tensor:
        with ab.steer(model, rule), attach(model, Watch(look)):
            out = model(**inputs, use_cache=True)
            rows, mask = [], inputs["attention_mask"]
            for step in range(4):
                mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
                out = model(
                    input_ids=inputs["input_ids"][:, step : step + 1],
                    attention_mask=mask,
                    past_key_values=out.past_key_values,
                )
                rows.append(out.logits)
        return torch.cat(rows, 1)

    short, long, taken = both(run)
    assert all(taken)
    assert (short - long).abs().max() < 2e-5 * long.abs().max()
    assert len(seen) == 8
    for output, plain in seen:
        assert not torch.equal(output[:, :, 1], plain[:, :, 1])
        if heads != "all":
            assert torch.equal(output[:, :, ::2], plain[:, :, ::2])


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("length", [40, 1030])
def test_queries_that_a_rule_replaces(length: int, padding: str) -> None:
    """In the prompt and in a decoded token; with a bias beside them."""
    model, inputs = llama(), text(length, padding)
    rules = (
        BlockHeads(mode="uniform", heads=ODD),
        ab.rules.KeyShift(keys=KEYS, amount=2.0, heads=(0, 1)),
    )
    seen: list[tuple[Tensor, Tensor]] = []

    def look(call: Call, extra: ab.Bias | None, output: Tensor) -> None:
        if call.site.layer == 0:
            seen.append((output, call.plain_again()))

    def run() -> Tensor:
        with ab.steer(model, *rules), attach(model, Watch(look)):
            out = model(**inputs, use_cache=True)
            mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
            more = model(
                input_ids=inputs["input_ids"][:, :1],
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
        return torch.cat([out.logits, more.logits], 1)

    short, long, taken = both(run)
    # Queries of padding stay plain, so a padded prompt is told apart row by row.
    assert taken == [padding == "none"] * 2 + [True] * 2
    real = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1).bool()
    assert (short - long)[real].abs().max() < 2e-5 * long[real].abs().max()
    for output, plain in seen:
        assert torch.equal(output[:, :, 2], plain[:, :, 2])
        # Those who look see the call with its new queries: only the bias differs from that.
        assert all(not torch.equal(output[:, :, n], plain[:, :, n]) for n in (0, 1))


@torch.no_grad()
def test_where_zeros_are_not_neutral_rows_are_told_apart() -> None:
    model, inputs = llama(), text(40)
    rule = ab.rules.KeyShift(keys=KEYS, amount=2.0, heads=ODD)
    with mock.patch.object(shifted, "neutral", return_value=False), ab.steer(model, rule):
        long = model(**inputs).logits
    with ab.steer(model, rule):
        assert torch.allclose(model(**inputs).logits, long, atol=1e-5)


def test_with_gradients_to_the_bias_or_the_model_the_long_route() -> None:
    model, inputs = llama(), text(40)
    taken: list[Any] = []
    real = shifted.shifted

    def watched(*given: Any, **named: Any) -> Any:
        taken.append(real(*given, **named))
        return taken[-1]

    rule = ab.rules.KeyShift(keys=KEYS, amount=2.0, heads=ODD)
    with mock.patch("attnbias.steer.shift.shifted", watched), ab.steer(model, rule):
        model(**inputs).logits.sum().backward()
    assert taken
    assert all(one is None for one in taken)


@torch.no_grad()
@pytest.mark.parametrize("heads", ["all", ODD])
def test_a_token_whose_rows_are_all_moved_reads_keys_once_for_a_group(heads: Any) -> None:
    model, inputs = llama(), text(40)
    rule = ab.rules.KeyShift(keys=KEYS, amount=2.0, heads=heads)
    routes: list[str] = []
    real = shifted._run

    def watched(call: Call, weight: Any, query: Tensor, route: str) -> Tensor:
        routes.append(route)
        return real(call, weight, query, route)

    def run() -> Tensor:
        with ab.steer(model, rule):
            cache = model(**inputs, use_cache=True).past_key_values
            token = torch.full((2, 1), 7)
            routes.clear()
            found: Tensor = model(input_ids=token, past_key_values=cache).logits
        return found

    plain = model(input_ids=torch.cat([inputs["input_ids"], torch.full((2, 1), 7)], 1)).logits[
        :, -1:
    ]
    with mock.patch.object(shifted, "_run", watched):
        short = run()
    taken = routes[-1]
    with mock.patch.object(engine, "shift", return_value=None):
        long = run()
    torch.testing.assert_close(short, long)
    assert (short - plain).abs().max() > 1e-4  # leaving the rule out would be seen
    assert taken == ("packed" if heads == "all" else "grouped")
