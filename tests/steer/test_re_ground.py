"""ReGround beside a block written out by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.steer.rules.re_ground import ReGround
from tests.cases.rule import RELATIVE, off
from tests.cases.unet import UNetCase
from tests.steer.test_diffusion import state
from tests.steer.unets import boxes, inputs, order, unet


@pytest.fixture(scope="module")
def model() -> Any:
    return unet(gated=True)


@contextlib.contextmanager
def by_hand(model: Any, beta: Any, parallel: Any = lambda layer: True) -> Iterator[Any]:
    """A copy whose blocks compute x + beta * delta + CA(x or y), then the feed-forward."""
    other = copy.deepcopy(model)
    named = [
        (n, m) for n, m in other.named_modules() if type(m).__name__ == "BasicTransformerBlock"
    ]
    for layer, (_, block) in enumerate(sorted(named, key=lambda entry: order(entry[0]))):

        def forward(
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            cross_attention_kwargs: Any = None,
            block: Any = block,
            beside: bool = parallel(layer),
            **_: Any,
        ) -> Tensor:
            x = hidden_states + block.attn1(block.norm1(hidden_states))
            delta = torch.zeros_like(x)
            if cross_attention_kwargs:
                both = torch.cat(
                    [x, block.fuser.linear(cross_attention_kwargs["gligen"]["objs"])], 1
                )
                fuser, count = block.fuser, x.shape[1]
                first = x + fuser.alpha_attn.tanh() * fuser.attn(fuser.norm1(both))[:, :count]
                delta = first + fuser.alpha_dense.tanh() * fuser.ff(fuser.norm2(first)) - x
            y = x + torch.as_tensor(beta).reshape(-1, 1, 1) * delta
            read = x if beside else y
            out = y + block.attn2(block.norm2(read), encoder_hidden_states=encoder_hidden_states)
            result: Tensor = out + block.ff(block.norm3(out))
            return result

        block.forward = forward
    yield other


class TestReGround(UNetCase):
    __test__ = True
    gated = True
    zero, strengths = False, (True,)
    steps = (950,)

    def rule(self, strength: bool) -> ReGround:
        return ReGround(parallel=strength)

    def oracle(self, model: Any, strength: bool, timestep: int) -> Any:
        return by_hand(model, 1.0, lambda layer: strength)

    def given(self, timestep: int = 950) -> dict[str, Any]:
        return {**inputs(timestep=timestep), **boxes()}


@torch.no_grad()
def test_equals_the_block_by_hand(model: Any) -> None:
    given = {**inputs(), **boxes()}
    plain = model(**given).sample
    with ab.steer(model, ReGround()):
        found = model(**given).sample
    with by_hand(model, 1.0) as other:
        assert off(found, other(**given).sample) < RELATIVE
    assert off(plain, found) > 30 * RELATIVE
    with by_hand(model, 1.0, lambda layer: False) as other:  # the hand itself is GLIGEN there
        assert off(plain, other(**given).sample) < RELATIVE
    with ab.steer(model, ReGround(layers=[1, 2])):
        some = model(**given).sample
    with by_hand(model, 1.0, lambda layer: layer in (1, 2)) as other:
        assert off(some, other(**given).sample) < RELATIVE
    assert off(some, found) > 30 * RELATIVE


@torch.no_grad()
def test_the_schedule(model: Any) -> None:
    """With gamma 0.3 the boxes act from step 700 on; after it the model is the one without them."""
    base = {}
    for step in (999, 700, 699, 0):
        given = {**inputs(timestep=step), **boxes()}
        base[step] = model(**inputs(timestep=step)).sample
        for parallel in (True, False):
            with ab.steer(model, ReGround(gamma=0.3, parallel=parallel)):
                found = model(**given).sample
            beta = float(step >= 700)
            with by_hand(model, beta, lambda layer, parallel=parallel: parallel) as other:
                wanted = other(**given).sample
            assert off(found, wanted) < RELATIVE
            assert (off(found, base[step]) < RELATIVE) == (step < 700)
    given = {**inputs(), **boxes(), "timestep": torch.tensor([900, 100])}
    with ab.steer(model, ReGround(gamma=0.3)):
        found = model(**given).sample
    with by_hand(model, [1.0, 0.0]) as other:
        assert off(found, other(**given).sample) < RELATIVE


@torch.no_grad()
def test_without_boxes_or_strength_it_is_the_plain_model(model: Any) -> None:
    given = {**inputs(), **boxes()}
    plain = model(**given).sample
    with ab.steer(model, ReGround(parallel=False)):
        assert torch.equal(model(**given).sample, plain)
    with pytest.warns(UserWarning, match="changed nothing"), ab.steer(model, ReGround()):
        assert torch.equal(model(**inputs()).sample, model(**inputs()).sample)


@torch.no_grad()
def test_rows_do_not_touch_each_other(model: Any) -> None:
    given, other = {**inputs(), **boxes()}, {**inputs(), **boxes(seed=5)}
    mixed = copy.deepcopy(given)
    for name, value in mixed["cross_attention_kwargs"]["gligen"].items():
        value[1] = other["cross_attention_kwargs"]["gligen"][name][1]
    with ab.steer(model, ReGround()):
        found, changed = model(**given).sample, model(**mixed).sample
    assert off(changed[0], found[0]) < RELATIVE
    assert off(changed[1], found[1]) > 30 * RELATIVE


@torch.no_grad()
def test_composes_and_restores(model: Any) -> None:
    """Beside a bias on the prompt, nested either way; afterwards nothing is left."""
    before = state(model)
    given = {**inputs(), **boxes()}
    plain = model(**given).sample
    shift = ab.rules.KeyShift(keys=[2], factor=6.0, heads="all", towers=("cross",))
    with ab.steer(model, ReGround(), shift):
        together = model(**given).sample
    with ab.steer(model, shift), ab.steer(model, ReGround()):
        nested = model(**given).sample
    with by_hand(model, 1.0) as other, ab.steer(other, shift):
        wanted = other(**given).sample
    assert off(together, wanted) < RELATIVE
    assert torch.equal(nested, together)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    hook = model.conv_out.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"), ab.steer(model, ReGround()):
        model(**given)
    hook.remove()
    assert state(model) == before
    assert torch.equal(model(**given).sample, plain)


def test_refusals_and_json(tmp_path: Path, model: Any, request: pytest.FixtureRequest) -> None:
    with pytest.raises(Refused, match="load a GLIGEN model"), ab.steer(unet(), ReGround()):
        pass
    for given in ({"gamma": 1.5}, {"gamma": -0.1}, {"steps": 0}):
        with pytest.raises(AttnbiasError, match="must be"):
            ReGround(**given)
    recipe = ab.Recipe((ReGround(gamma=0.3),), "some/model", "abc123")
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe
