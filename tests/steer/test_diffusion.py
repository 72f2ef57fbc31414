"""Diffusers UNets: sites, spans, rules, statistics and gradients carry their cross-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.hub import attach
from attnbias.hub.diffusion import guided, phrases
from attnbias.steer.masses import masses
from attnbias.steer.rule import Heads, Rule
from tests.cases.rule import RELATIVE, Watch, off
from tests.steer.sample_rules import SetShare
from tests.steer.unets import WORDS, dense, inputs, unet

SPANS = {"cat": (2, 4), "dog": (5, 6)}
CROSS = {"heads": "all", "towers": ("cross",)}


@pytest.fixture(scope="module")
def model() -> Any:
    return unet()


def shifted(factor: float, layers: Any = range(9), heads: Any = slice(None)) -> Any:
    def edit(tower: str, layer: int, scores: Tensor, timestep: Any) -> Tensor:
        if tower == "cross" and layer in layers:
            scores = scores.clone()
            scores[:, heads, :, 2:4] += torch.tensor(factor).double().log()
        return scores.softmax(-1)

    return edit


def shared(share: float) -> Any:
    def edit(tower: str, layer: int, scores: Tensor, timestep: Any) -> Tensor:
        found = scores.softmax(-1)
        if tower == "cross":
            inside = torch.zeros(WORDS, dtype=torch.bool)
            inside[2:4] = True
            mass = found[..., inside].sum(-1, keepdim=True)
            found = torch.where(inside, found * share / mass, found * (1 - share) / (1 - mass))
        return found

    return edit


def test_sites(model: Any) -> None:
    """In the order of a forward: down, middle, up."""
    found = ab.hub.sites(model)
    assert [s.layer for s in found if s.tower == "cross"] == [0, 1, 2, 3]
    assert [s.layer for s in found if s.tower == "self"] == [0, 1, 2, 3]
    assert all((s.kind == "cross") == (s.tower == "cross") for s in found)
    assert [s.name.split(".")[0] for s in found if s.tower == "cross"] == [
        "down_blocks",
        "mid_block",
        "up_blocks",
        "up_blocks",
    ]
    assert {s.tower for s in ab.hub.sites(unet(gated=True))} == {"self", "cross", "gated"}


@torch.no_grad()
@pytest.mark.parametrize("factor", [0.5, 20.0])
def test_a_bias_equals_the_dense_rewrite(model: Any, factor: float) -> None:
    given = inputs()
    plain = model(**given).sample
    rule = ab.rules.KeyShift(keys=["cat"], factor=factor, **CROSS)
    with ab.steer(model, rule, spans=SPANS):
        found = model(**given).sample
    with dense(model, shifted(factor)):
        wanted = model(**given).sample
    assert off(found, wanted) < RELATIVE
    assert off(plain, wanted) > 30 * RELATIVE
    some = ab.rules.KeyShift(
        keys=["cat"], factor=factor, heads=[0, 2], layers=[1, 3], towers=("cross",)
    )
    with ab.steer(model, some, spans=SPANS):
        found = model(**given).sample
    with dense(model, shifted(factor, (1, 3), [0, 2])):
        wanted = model(**given).sample
    assert off(found, wanted) < RELATIVE
    with dense(model, shifted(factor, (1, 3), [0, 1])):
        assert off(found, model(**given).sample) > 3 * RELATIVE


@torch.no_grad()
def test_a_reallocation_equals_the_dense_rewrite(model: Any) -> None:
    given = inputs()
    with ab.steer(model, SetShare(keys=["cat"], share=0.6, **CROSS), spans=SPANS):
        found = model(**given).sample
    with dense(model, shared(0.6)):
        wanted = model(**given).sample
    assert off(found, wanted) < RELATIVE
    assert off(model(**given).sample, wanted) > 30 * RELATIVE


@torch.no_grad()
def test_composes(model: Any) -> None:
    """A bias and then a share, in one context and in nested ones."""
    given = inputs()
    shift = ab.rules.KeyShift(keys=["dog"], factor=6.0, **CROSS)
    share = SetShare(keys=["cat"], share=0.6, **CROSS)

    def edit(tower: str, layer: int, scores: Tensor, timestep: Any) -> Tensor:
        scores = scores.clone()
        if tower == "cross":
            scores[..., 5] += torch.tensor(6.0).double().log()
        return shared(0.6)(tower, layer, scores, timestep)

    with ab.steer(model, shift, share, spans=SPANS):
        together = model(**given).sample
    with ab.steer(model, shift, spans=SPANS), ab.steer(model, share, spans=SPANS):
        nested = model(**given).sample
    with dense(model, edit):
        wanted = model(**given).sample
    assert off(together, wanted) < RELATIVE
    assert off(nested, wanted) < RELATIVE


@torch.no_grad()
def test_guidance_and_masked_words(model: Any) -> None:
    """The unconditional row has no spans; masked prompt tokens are in none and stay hidden."""
    given = inputs()
    given["encoder_attention_mask"] = torch.ones(2, WORDS, dtype=torch.long)
    given["encoder_attention_mask"][1, 3:] = 0
    plain = model(**given).sample
    rule = ab.rules.KeyShift(keys=["cat"], factor=9.0, **CROSS)
    with ab.steer(model, rule, spans=guided(SPANS)):
        found = model(**given).sample

    def edit(tower: str, layer: int, scores: Tensor, timestep: Any) -> Tensor:
        if tower == "cross":
            scores = scores.clone()
            scores[1, :, :, 2] += torch.tensor(9.0).double().log()
        return scores.softmax(-1)

    with dense(model, edit):
        wanted = model(**given).sample
    assert off(found, wanted) < RELATIVE
    assert torch.equal(found[0], plain[0])
    assert off(found[1], plain[1]) > 30 * RELATIVE
    with masses(model, SPANS, towers=("cross",)) as seen:
        model(**given)
    assert all(float(one["dog"][1].abs().max()) == 0 for one in seen.values())


@torch.no_grad()
def test_statistics_equal_those_of_the_map(model: Any) -> None:
    given = inputs()
    plain = model(**given).sample
    chosen = [ab.statistics.Entropy(), ab.statistics.Received()]
    with ab.observe(model, chosen) as seen:
        assert torch.equal(model(**given).sample, plain)
    with dense(model) as maps:
        model(**given)
    rows = {(r.tower, r.layer, r.head): r.value for r in seen.table() if r.statistic == "entropy"}
    for (tower, layer), found in maps.items():
        entropy = -(found * found.log()).sum(-1).mean((0, 2))
        for head, value in enumerate(entropy.tolist()):
            assert rows[tower, layer, head] == pytest.approx(value, abs=1e-4)
    assert len(rows) == sum(found.shape[1] for found in maps.values())


def test_masses_have_gradients_to_the_latents(model: Any) -> None:
    """The share of attention on a word, and its gradient, are those of the explicit map."""
    given = inputs()

    def loss(parts: Any) -> tuple[Tensor, Tensor]:
        total = torch.stack([part.double().square().mean() for part in parts]).sum()
        (grad,) = torch.autograd.grad(total, given["sample"])
        return total, grad

    given["sample"].requires_grad_()
    with masses(model, SPANS, towers=("cross",)) as seen:
        model(**given)
        found, grad = loss(one["cat"] for one in seen.values())
        assert [s.layer for s in seen] == [0, 1, 2, 3]
    with dense(model) as maps:
        model(**given)
        parts = [m[..., 2:4].sum(-1) for (tower, _), m in maps.items() if tower == "cross"]
        wanted, expected = loss(parts)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert off(grad, expected) < 10 * RELATIVE
    assert float(grad.abs().max()) > 0


def test_masses_under_a_rule(model: Any) -> None:
    """What is seen is under the edits of the contexts around."""
    with torch.no_grad(), ab.steer(model, SetShare(keys=["cat"], share=0.6, **CROSS), spans=SPANS):
        with masses(model, SPANS, towers=("cross",)) as seen:
            model(**inputs())
        for one in seen.values():
            assert float((one["cat"] - 0.6).abs().max()) < 1e-5
    with pytest.raises(AttnbiasError, match="needs a span"), masses(model, {}):
        pass


@torch.no_grad()
def test_a_rule_looks(model: Any) -> None:
    """`look` with maps and received attention, as in a language model."""
    given, kept = inputs(), []

    with dense(model) as maps:
        model(**given)

    @dataclass(frozen=True, kw_only=True)
    class Look(Rule):
        heads: Heads = "all"

        def look(self, site: Any) -> Any:
            kept.append((site.site.layer, site.attention(), site.received(), site.timestep))

    with ab.steer(model, Look(towers=("cross",))):
        model(**given)
    assert [layer for layer, *_ in kept] == [0, 1, 2, 3]
    for layer, attention, received, timestep in kept:
        assert off(attention, maps["cross", layer]) < RELATIVE
        assert off(received, maps["cross", layer].sum(2)) < RELATIVE
        assert timestep.tolist() == [500]


def state(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        found[name] = {key: id(value) for key, value in vars(module).items() if key[0] != "_"}
        found[f"{name} hooks"] = (len(module._forward_hooks), len(module._forward_pre_hooks))
    return found


@torch.no_grad()
def test_restores_the_processors(model: Any) -> None:
    given, before = inputs(), state(model)
    plain, processors = model(**given).sample, dict(model.attn_processors)
    rule = ab.rules.KeyShift(keys=["cat"], factor=9.0, **CROSS)
    with ab.steer(model, rule, spans=SPANS):
        assert not torch.equal(model(**given).sample, plain)
        assert state(model) != before
    assert state(model) == before
    assert all(model.attn_processors[name] is one for name, one in processors.items())

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    with (
        pytest.raises(RuntimeError, match="in the middle"),
        ab.steer(model, rule, spans=SPANS),
        attach(model, Watch(fail)),
    ):
        model(**given)
    assert state(model) == before
    assert torch.equal(model(**given).sample, plain)
    with ab.steer(model, ab.rules.KeyShift(keys=["cat"], factor=1.0, **CROSS), spans=SPANS):
        assert torch.equal(model(**given).sample, plain)


@torch.no_grad()
def test_fused_attention_runs_inside(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No map of the size queries x keys is made for self-attention under a reallocation."""
    from attnbias.lowering import flash

    calls: list[int] = []
    real = flash.call

    def count(*args: Any, **kwargs: Any) -> Any:
        calls.append(args[0].shape[2])
        return real(*args, **kwargs)

    monkeypatch.setattr(flash, "call", count)
    with ab.steer(model, SetShare(keys=["cat"], share=0.6, **CROSS), spans=SPANS):
        model(**inputs())
    assert 64 in calls


def test_processors_that_do_more_are_refused() -> None:
    from diffusers.models import attention_processor as kinds

    rule = ab.rules.KeyShift(keys=["cat"], factor=9.0, **CROSS)
    for processor in (kinds.AttnProcessor(), kinds.SlicedAttnProcessor(1), lambda *_: None):
        model = unet()
        for module in model.modules():
            if type(module).__name__ == "Attention":
                module.processor = processor
        before = state(model)
        with (
            pytest.raises(Refused, match="may do more than attention"),
            ab.steer(model, rule, spans=SPANS),
        ):
            pass
        assert state(model) == before


@dataclass(frozen=True, kw_only=True)
class Hidden(Rule):
    heads: Heads = "all"
    hidden_at: ClassVar[tuple[str, ...]] = ("layer",)

    def hidden(self, site: Any, hidden: Tensor) -> Tensor:
        return hidden + 1


def test_what_is_not_carried_is_refused(model: Any) -> None:
    with (
        pytest.raises(Refused, match="edits more than attention"),
        ab.steer(model, Hidden(towers=("cross",))),
    ):
        pass
    with (
        pytest.raises(Refused, match="names no tower and the model has self, cross"),
        ab.steer(model, ab.rules.KeyShift(keys=["cat"], factor=2.0, heads="all"), spans=SPANS),
    ):
        pass
    with (
        pytest.raises(AttnbiasError, match="names layer 9"),
        ab.steer(
            model,
            ab.rules.KeyShift(keys=["cat"], factor=2.0, layers=[9], **CROSS),
            spans=SPANS,
        ),
    ):
        pass


def test_phrases(minilm: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    found = phrases(tokenizer, "a black cat and a dog", ["black cat", "dog"])
    assert found == {"black cat": (2, 4), "dog": (6, 7)}
    assert guided(found) == {"black cat": [(0, 0), (2, 4)], "dog": [(0, 0), (6, 7)]}
    for phrase in ("a ", "bird", ""):
        with pytest.raises(AttnbiasError, match="expected once"):
            phrases(tokenizer, "a black cat and a dog", [phrase])
    with pytest.raises(AttnbiasError, match="fast tokenizer"):
        phrases(object(), "a", ["a"])
