"""Dropping tokens at a layer is hiding their keys from it and all after it, exactly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import attnbias as ab
from attnbias.errors import AttnbiasError, Refused
from attnbias.hub import Call, attach, sites
from attnbias.steer import HiddenCall, Tokens
from attnbias.steer.hidden import TokenCall
from attnbias.steer.rule import Heads, Rule
from tests.cases.rule import RELATIVE, Watch, off, padded
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import Subject, make

Plan = tuple[tuple[int, tuple[int, ...]], ...]  # (layer, positions that go there)
PLAN: Plan = ((1, (3, 5)), (2, (2,)))
DECODERS = ("stories", "mistral", "gpt_oss", "llava", "qwen2_vl", "gemma3")


@dataclass(frozen=True, kw_only=True)
class Drop(Rule):
    heads: Heads = "all"
    plan: Plan = PLAN
    drops_tokens: ClassVar[bool] = True

    def tokens(self, site: TokenCall, hidden: Tensor) -> Tokens | None:
        gone = [p for layer, places in self.plan if layer == site.layer for p in places]
        keep = torch.stack([site.positions != p for p in gone]).all(0) if gone else None
        return None if keep is None or bool(keep.all()) else Tokens(keep=keep)


def plan_of(subject: Subject) -> Plan:
    """Two stages, or one where the model has two layers."""
    towers = subject.towers
    count = sum(towers is None or site.tower in towers for site in sites(subject.model))
    return PLAN if count > 2 else PLAN[:1]


def rule_of(subject: Subject) -> Drop:
    return Drop(plan=plan_of(subject), towers=subject.towers)


@contextlib.contextmanager
def hidden_keys(subject: Subject, model: Any, plan: Plan, positions: Tensor) -> Iterator[None]:
    """Plain hooks: keys at the plan's positions get no attention in its layers and those after."""
    handles = []
    for site in sites(model):
        if subject.towers is not None and site.tower not in subject.towers:
            continue
        gone = [p for layer, places in plan if layer <= site.layer for p in places]

        def before(_: Any, args: Any, kwargs: Any, gone: list[int] = gone) -> Any:
            mask = kwargs["attention_mask"]
            rows, length = positions.shape
            if mask is None:  # an encoder without padding
                mask = torch.zeros(rows, 1, length, length)
            low = torch.finfo(mask.dtype).min
            columns = torch.stack([positions == p for p in [*gone, -7]]).any(0)
            mask = mask.masked_fill(columns[:, None, None], low)
            return args, {**kwargs, "attention_mask": mask}

        module = model.get_submodule(site.name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def kept(length: int, plan: Plan) -> list[int]:
    gone = {p for _, places in plan for p in places}
    return [p for p in range(length) if p not in gone]


def grown(inputs: dict[str, Tensor], token: Tensor) -> dict[str, Tensor]:
    """The inputs with one more token (and one more entry of whatever counts tokens)."""
    found = dict(inputs)
    shape = inputs["input_ids"].shape
    for name, value in inputs.items():
        if value.shape == shape:
            more = token if name == "input_ids" else torch.ones_like(token) * (name[:4] == "atte")
            found[name] = torch.cat([value, more[:, None]], 1)
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", [*DECODERS, "minilm"])
def test_equals_hiding_the_keys(name: str, request: pytest.FixtureRequest) -> None:
    """Prefill: every kept row, beside whole forwards of the eager model with masked keys."""
    subject = make(name, request)
    plain = subject.run()
    with ab.steer(subject.model, rule_of(subject)):
        found = subject.run()
    model, plan = subject.eager(), plan_of(subject)
    positions = torch.arange(found.shape[1]).expand(2, -1)
    with hidden_keys(subject, model, plan, positions):
        wanted = subject.run(model)
    rows = kept(found.shape[1], plan)
    assert found.shape == plain.shape
    assert off(found[:, rows], wanted[:, rows]) < RELATIVE
    assert off(plain[:, rows], wanted[:, rows]) > 30 * RELATIVE
    with hidden_keys(subject, model, ((plan[0][0] - 1, plan[0][1]), *plan[1:]), positions):
        assert off(found[:, rows], subject.run(model)[:, rows]) > 3 * RELATIVE


LATE: Plan = ((1, (9, 11)), (2, (10,)))  # inside the windows of the first tokens that follow


@torch.no_grad()
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_decode_steps_after(name: str, late: bool, request: pytest.FixtureRequest) -> None:
    """The scores of every step from the short cache are those of whole forwards, masked."""
    subject = make(name, request)
    model, plan, inputs = subject.eager(), plan_of(subject), dict(subject.inputs)
    plan = LATE[: len(plan)] if late else plan
    with ab.steer(subject.model, Drop(plan=plan, towers=subject.towers)):
        made = subject.model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for step in range(5):
        positions = torch.arange(inputs["input_ids"].shape[1]).expand(2, -1)
        with hidden_keys(subject, model, plan, positions):
            wanted = subject.run(model, **inputs, use_cache=False)[:, -1]
        assert off(made.logits[step], wanted) < RELATIVE, step
        inputs = grown(inputs, wanted.argmax(-1))
    assert torch.equal(made.sequences, inputs["input_ids"])
    if name in ("stories", "llava", "qwen2_vl"):  # the others have windows, which cut caches too
        lengths = [layer.keys.shape[-2] for layer in made.past_key_values.layers]
        gone = [sum(len(p) for layer, p in plan if layer <= n) for n in range(len(lengths))]
        assert lengths == [lengths[0] - count for count in gone]


@torch.no_grad()
def test_other_rules_find_their_keys_while_decoding(request: pytest.FixtureRequest) -> None:
    """A bias on position 6, which stands at other slots of the short caches."""
    from transformers import DynamicCache

    subject = make("stories", request)
    ids, model = subject.inputs["input_ids"], subject.eager()
    shift = ab.rules.KeyShift(keys=[6], factor=30.0, heads="all")
    with ab.steer(subject.model, rule_of(subject), shift):
        cache = DynamicCache(config=subject.model.config)
        parts = [subject.model(input_ids=ids[:, :9], past_key_values=cache).logits]
        for step in range(9, 13):
            step_ids = ids[:, step : step + 1]
            parts.append(subject.model(input_ids=step_ids, past_key_values=cache).logits)
    with hidden_keys(subject, model, PLAN, torch.arange(13).expand(2, -1)), ab.steer(model, shift):
        wanted = subject.run(model)
    rows = kept(13, PLAN)
    assert off(torch.cat(parts, 1)[:, rows], wanted[:, rows]) < RELATIVE


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["stories", "minilm", "mistral", "qwen2_vl", "gemma3"])
def test_padding(name: str, side: str, request: pytest.FixtureRequest) -> None:
    """A row of a padded batch is what it would be alone, and what the masked model makes of it."""
    subject = make(name, request)
    inputs, positions, rows = padded(subject, side)
    rule, plan, model = rule_of(subject), plan_of(subject), subject.eager()
    with ab.steer(subject.model, rule):
        found = subject.run(**inputs)
    with hidden_keys(subject, model, plan, positions):
        wanted = subject.run(model, **inputs)
    for row, part in enumerate(rows):
        real = torch.arange(found.shape[1])[part][kept(found[row, part].shape[0], plan)]
        assert off(found[row, real], wanted[row, real]) < RELATIVE
        alone = subject.row(row, part, **inputs)
        del alone["attention_mask"]
        with ab.steer(subject.model, rule):
            single = replace(subject, inputs=alone).run()
        assert off(found[row, part], single[0]) < RELATIVE


@torch.no_grad()
def test_generate_with_padding(request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    inputs, _, _ = padded(subject, "left")
    del inputs["position_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with ab.steer(subject.model, rule_of(subject)):
        found = subject.model.generate(**inputs, **options)
    model, given = subject.eager(), dict(inputs)
    for _ in range(6):
        places = given["attention_mask"].cumsum(-1) - 1
        places = places.masked_fill(given["attention_mask"] == 0, -1)
        with hidden_keys(subject, model, plan_of(subject), places):
            scores = model(**given, position_ids=places.clamp(min=0), use_cache=False).logits[:, -1]
        given = grown(given, scores.argmax(-1))
    assert torch.equal(found, given["input_ids"])


@torch.no_grad()
@pytest.mark.parametrize("name", ["stories", "mistral"])
def test_chunks_and_caches(name: str, request: pytest.FixtureRequest) -> None:
    from transformers import DynamicCache, StaticCache

    subject = make(name, request)
    ids, model = subject.inputs["input_ids"], subject.model
    kinds = [DynamicCache] if name == "mistral" else [DynamicCache, StaticCache]
    with ab.steer(model, rule_of(subject)):
        wanted = subject.run(use_cache=False)
        for sizes in ([ids.shape[1]], [7, 3, 3], [5, 5, 3], [7] + [1] * 6):
            for kind in kinds:
                options = {} if kind is DynamicCache else {"max_cache_len": 24}
                cache, parts, start = kind(config=model.config, **options), [], 0
                for size in sizes:
                    part = ids[:, start : start + size]
                    parts.append(model(input_ids=part, past_key_values=cache).logits)
                    start += size
                assert off(torch.cat(parts, 1), wanted) < RELATIVE, (sizes, kind)


@torch.no_grad()
def test_a_rewound_cache_and_beams(request: pytest.FixtureRequest) -> None:
    """Tokens taken back, rows repeated and rows in another order: the slots follow."""
    from transformers import DynamicCache

    subject = make("stories", request)
    ids, model = subject.inputs["input_ids"], subject.model
    with ab.steer(model, rule_of(subject)):
        wanted = subject.run(use_cache=False)
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :9], past_key_values=cache)
        model(input_ids=ids[:, :2], past_key_values=cache)
        cache.crop(-2)
        found = model(input_ids=ids[:, 9:], past_key_values=cache).logits
        assert off(found, wanted[:, 9:]) < RELATIVE
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :9], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        found = model(input_ids=ids[:, 9:].repeat_interleave(2, 0), past_key_values=cache).logits
        assert off(found, wanted[:, 9:].repeat_interleave(2, 0)) < RELATIVE
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        short = model.generate(ids, **options)
        assert torch.equal(short, model.generate(ids, **options, use_cache=False))
        cache = DynamicCache(config=model.config)
        model(input_ids=ids[:, :9], past_key_values=cache)
        cache.crop(-6)
        with pytest.raises(Refused, match="cut back"):
            model(input_ids=ids[:, 3:], past_key_values=cache)


@torch.no_grad()
def test_layers_run_on_fewer_tokens(request: pytest.FixtureRequest) -> None:
    """Queries, keys and MLP rows are fewer, while recorded hidden states keep their length."""
    subject = make("llava", request)
    seen: list[tuple[int, int, int]] = []

    def see(call: Call, extra: Any, output: Tensor) -> None:
        if call.site.tower == "text":
            seen.append((call.site.layer, call.query.shape[2], call.key.shape[2]))
            real = call.query_positions[0].tolist()
            gone = {p for layer, places in PLAN if layer <= call.site.layer for p in places}
            assert real == [p for p in range(16) if p not in gone]

    rows: list[int] = []
    layers = subject.model.model.language_model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
        for layer in layers
    ]
    with ab.steer(subject.model, rule_of(subject)), attach(subject.model, Watch(see)):
        out = subject.model(**subject.inputs, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    assert seen == [(0, 16, 16), (1, 14, 14), (2, 13, 13)]
    assert rows == [16, 14, 13]
    assert {state.shape[1] for state in out.hidden_states} == {16}
    # A dropped token stands still from the layer where it went.
    assert torch.equal(out.hidden_states[1][:, 3], out.hidden_states[2][:, 3])
    assert not torch.equal(out.hidden_states[1][:, 4], out.hidden_states[2][:, 4])


@torch.no_grad()
def test_vision_towers(request: pytest.FixtureRequest) -> None:
    """Without masks and positions: the patches that are left see each other alone."""
    subject = make("vit", request)
    plain = subject.run()
    with ab.steer(subject.model, Drop(plan=((1, (3, 5)), (2, (2,))))):
        found = subject.run()
    model = subject.eager()

    def hide(gone: list[int]) -> Any:
        def edit(map: Map) -> Tensor:
            left = map.probabilities.clone()
            left[..., gone] = 0
            return left / left.sum(-1, keepdim=True)

        return edit

    edits = [DenseEdit(hide([3, 5]), [1]), DenseEdit(hide([2, 3, 5]), [2])]
    with rewritten(model, edits):
        wanted = subject.run(model)
    assert off(found, wanted) < RELATIVE
    assert off(plain, wanted) > 30 * RELATIVE


@torch.no_grad()
def test_other_rules_beside_it(request: pytest.FixtureRequest) -> None:
    """A bias on keys by position, and nested contexts: each drop is hidden, each shift is felt."""
    subject = make("stories", request)
    shift = ab.rules.KeyShift(keys=[4], factor=5.0, heads="all")
    first, second = Drop(plan=((1, (3,)),)), Drop(plan=((1, (5,)), (2, (2,))))
    with ab.steer(subject.model, first, second, shift):
        together = subject.run()
    with (
        ab.steer(subject.model, first),
        ab.steer(subject.model, shift),
        ab.steer(subject.model, second),
    ):
        nested = subject.run()
    assert torch.equal(together, nested)
    model = subject.eager()
    with (
        hidden_keys(subject, model, PLAN, torch.arange(13).expand(2, -1)),
        ab.steer(model, shift),
    ):
        wanted = subject.run(model)
    rows = kept(13, PLAN)
    assert off(together[:, rows], wanted[:, rows]) < RELATIVE
    with ab.steer(subject.model, first, second):
        assert off(subject.run()[:, rows], wanted[:, rows]) > 30 * RELATIVE


def test_gradients(request: pytest.FixtureRequest) -> None:
    """To the embeddings: those of the masked model."""
    subject = make("stories", request)
    rows = kept(13, PLAN)

    def gradient(model: Any) -> Tensor:
        embeds = model.get_input_embeddings()(subject.inputs["input_ids"]).detach()
        embeds.requires_grad_()
        out = model(inputs_embeds=embeds, use_cache=False).logits[:, rows]
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        (grad,) = torch.autograd.grad((out * weight).sum(), embeds)
        return grad

    with ab.steer(subject.model, rule_of(subject)):
        found = gradient(subject.model)
    model = subject.eager()
    with hidden_keys(subject, model, PLAN, torch.arange(13).expand(2, -1)):
        wanted = gradient(model)
    assert off(found, wanted) < 10 * RELATIVE


def test_restores_on_exit_and_on_exception(request: pytest.FixtureRequest) -> None:
    subject = make("qwen2_vl", request)
    layers = [module for module in subject.model.modules() if hasattr(module, "self_attn")]
    before = [dict(vars(layer)) for layer in layers]
    with torch.no_grad():
        plain = subject.run()
        with ab.steer(subject.model, rule_of(subject)):
            assert not torch.equal(subject.run(), plain)

        def fail(*_: Any) -> None:
            raise RuntimeError("in the middle")

        hook = layers[2].register_forward_pre_hook(fail)
        with (
            pytest.raises(RuntimeError, match="in the middle"),
            ab.steer(subject.model, rule_of(subject)),
        ):
            subject.run()
        hook.remove()
        assert torch.equal(subject.run(), plain)
        with ab.steer(subject.model, Drop(plan=((1, (99,)),), towers=("text",))):
            assert torch.equal(subject.run(), plain)  # nothing to drop: bit for bit
    for layer, old in zip(layers, before, strict=True):
        assert vars(layer).keys() == old.keys()


@dataclass(frozen=True, kw_only=True)
class Keeps(Rule):
    heads: Heads = "all"
    what: str = ""
    drops_tokens: ClassVar[bool] = True

    def tokens(self, site: TokenCall, hidden: Tensor) -> Tokens | None:
        keep = torch.ones(2, hidden.shape[1], dtype=torch.bool)
        if self.what == "first layer":
            keep[:, 2] = False
            return Tokens(keep=keep) if site.layer == 0 else None
        if self.what == "uneven":
            keep[0, 2] = False
        if self.what == "last":
            keep[:, -1] = False
        if self.what == "shape":
            keep = keep[:, 1:]
        append = hidden[:, :1] if self.what == "both" else None
        return Tokens(keep=keep, append=append) if site.layer == 1 else None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("uneven", "keeps 12, 13 tokens in the rows of one batch"),
        ("last", "drops the last token of a row"),
        ("shape", r"keep must be booleans \(2 or 1, 13\)"),
        ("both", "drop or append tokens, not both"),
        ("first layer", "from the second layer on"),
    ],
)
def test_refusals(what: str, message: str, request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    with (
        torch.no_grad(),
        pytest.raises(AttnbiasError, match=message),
        ab.steer(subject.model, Keeps(what=what)),
    ):
        subject.run()


def test_a_layer_that_does_not_come_by_is_refused(request: pytest.FixtureRequest) -> None:
    """As in a graph that was compiled before the context."""
    subject = make("stories", request)
    layer: Any = subject.model.model.layers[1]
    with torch.no_grad(), ab.steer(subject.model, rule_of(subject)):
        own = vars(layer).pop("forward")
        with pytest.raises(Refused, match=r"text layer 1: its layer never came by.*reset"):
            subject.run(use_cache=False)
        layer.forward = own
        subject.run()


@dataclass(frozen=True, kw_only=True)
class Asks(Rule):
    """Runs a branch without the image in the middle of each forward, and changes nothing."""

    heads: Heads = "all"
    seen: ClassVar[list[int]] = []

    @property
    def branches(self) -> dict[str, ab.steer.Branch]:
        return {"bare": ab.steer.Branch(without=("image",))}

    def look(self, site: Any) -> int:
        return int(site.shape[2])

    def outputs(self, site: Any, out: Tensor) -> None:
        if site.site.layer == 2:
            self.seen.extend(site.branch("bare").looked.values())


@torch.no_grad()
def test_branches_have_tokens_of_their_own(request: pytest.FixtureRequest) -> None:
    """A forward inside another drops at positions of its own; the outer one goes on as it was."""
    subject = make("llava", request)
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "eos_token_id": None,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with ab.steer(subject.model, rule_of(subject), spans=subject.spans):
        wanted = subject.model.generate(**subject.inputs, **options)
    Asks.seen.clear()
    with ab.steer(subject.model, rule_of(subject), Asks(towers=("text",)), spans=subject.spans):
        found = subject.model.generate(**subject.inputs, **options)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, wanted.logits, strict=True))
    # Sixteen tokens less the four of the image, of which three are dropped in turn.
    assert Asks.seen[:3] == [12, 10, 9]
    assert len(Asks.seen) == 12


def test_gradient_checkpointing_is_refused(request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    subject.model.gradient_checkpointing_enable()
    subject.model.train()
    with (
        pytest.raises(Refused, match="under gradient checkpointing"),
        ab.steer(subject.model, rule_of(subject)),
    ):
        subject.run(use_cache=False)


def test_decoders_of_encoder_decoders_are_refused(request: pytest.FixtureRequest) -> None:
    subject = make("bart decoder", request)
    rule = Drop(plan=((1, (3,)),), towers=("decoder",))
    with (
        torch.no_grad(),
        pytest.raises(Refused, match="also attends to an encoder"),
        ab.steer(subject.model, rule),
    ):
        subject.run()


@dataclass(frozen=True, kw_only=True)
class Push(Rule):
    """Adds to the residual stream at one position."""

    heads: Heads = "all"
    hidden_at: ClassVar[tuple[str, ...]] = ("layer",)

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        return hidden + 0.5 * site.where((4,))[..., None]


@torch.no_grad()
def test_hidden_states_beside_it(request: pytest.FixtureRequest) -> None:
    """A rule on hidden states sees all tokens at their own positions."""
    subject = make("stories", request)
    with ab.steer(subject.model, rule_of(subject), Push()):
        found = subject.run()
    model = subject.eager()
    with hidden_keys(subject, model, PLAN, torch.arange(13).expand(2, -1)), ab.steer(model, Push()):
        wanted = subject.run(model)
    rows = kept(13, PLAN)
    assert off(found[:, rows], wanted[:, rows]) < RELATIVE
