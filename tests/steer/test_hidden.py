"""The hooks `hidden` and `tokens`, and layer inputs, on every class, beside plain PyTorch hooks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.hub.layers import layers
from attnbias.steer import HiddenCall, Rule, SiteCall, TokenCall, Tokens
from attnbias.steer.rule import Heads
from attnbias.steer.states import collect
from tests.cases.rule import RELATIVE, off, padded
from tests.steer.models import MAKERS, VOCABULARY, make, pixels, redraw, tokens

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TEXT = {**SIZES, "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KV = {"num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SIZES, "image_size": 16, "patch_size": 4}


@dataclass(frozen=True)
class Kind:
    """A class of model, and where its parts are: by name, independently of the library."""

    config: str
    model: str
    fields: dict[str, Any]
    layer: str
    attention: str
    mlp: str
    neurons: str | None
    sums: bool = True


KINDS = [
    Kind("LlamaConfig", "LlamaForCausalLM", {**TEXT, "num_key_value_heads": 2},
         "model.layers.{}", "self_attn", "mlp", "mlp.down_proj"),
    Kind("Qwen3Config", "Qwen3ForCausalLM", {**TEXT, **KV},
         "model.layers.{}", "self_attn", "mlp", "mlp.down_proj"),
    Kind("MistralConfig", "MistralForCausalLM", {**TEXT, "num_key_value_heads": 2},
         "model.layers.{}", "self_attn", "mlp", "mlp.down_proj"),
    Kind("Gemma3TextConfig", "Gemma3ForCausalLM", {**TEXT, **KV},
         "model.layers.{}", "post_attention_layernorm", "post_feedforward_layernorm",
         "mlp.down_proj"),
    Kind("GPT2Config", "GPT2LMHeadModel",
         {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "bos_token_id": 1,
          "eos_token_id": 2},
         "transformer.h.{}", "attn", "mlp", "mlp.c_proj"),
    Kind("GPTNeoXConfig", "GPTNeoXForCausalLM", TEXT,
         "gpt_neox.layers.{}", "attention", "mlp", "mlp.dense_4h_to_h"),
    Kind("OPTConfig", "OPTForCausalLM",
         {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "ffn_dim": 48,
          "num_attention_heads": 4, "vocab_size": VOCABULARY, "pad_token_id": 0,
          "bos_token_id": 1, "eos_token_id": 2},
         "model.decoder.layers.{}", "self_attn", "fc2", "fc2"),
    Kind("Phi3Config", "Phi3ForCausalLM", TEXT,
         "model.layers.{}", "self_attn", "mlp", "mlp.down_proj"),
    Kind("GptOssConfig", "GptOssForCausalLM",
         {**TEXT, **KV, "num_local_experts": 2, "num_experts_per_tok": 1},
         "model.layers.{}", "self_attn", "mlp", None),
    Kind("BertConfig", "BertModel", TEXT,
         "encoder.layer.{}", "attention.output.dense", "output.dense", "output.dense", False),
    Kind("ViTConfig", "ViTModel", IMAGE, "layers.{}", "attention", "mlp", "mlp.fc2"),
    Kind("Dinov2Config", "Dinov2Model", {**IMAGE, "mlp_ratio": 2},
         "encoder.layer.{}", "layer_scale1", "layer_scale2", "mlp.fc2"),
    Kind("Dinov2Config", "Dinov2Model", {**IMAGE, "mlp_ratio": 2, "use_swiglu_ffn": True},
         "encoder.layer.{}", "layer_scale1", "layer_scale2", "mlp.down_proj"),
    Kind("CLIPVisionConfig", "CLIPVisionModel", IMAGE,
         "encoder.layers.{}", "self_attn", "mlp", "mlp.fc2"),
    Kind("SiglipVisionConfig", "SiglipVisionModel", IMAGE,
         "encoder.layers.{}", "self_attn", "mlp", "mlp.fc2"),
]  # fmt: skip
NAMES = [f"{kind.model}{' swiglu' if 'use_swiglu_ffn' in kind.fields else ''}" for kind in KINDS]


def built(kind: Kind) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    config = getattr(transformers, kind.config)(**kind.fields)
    model = redraw(getattr(transformers, kind.model)(config)).eval()
    vision = "image_size" in kind.fields
    return model, {"pixel_values": pixels()} if vision else {"input_ids": tokens()}


def out(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    found = model(**inputs)
    result: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return result


@dataclass(frozen=True, kw_only=True)
class Turned(Rule):
    """Hidden states of one place, turned by a fixed matrix and scaled."""

    heads: Heads = "all"
    at: str
    amount: float
    calls: ClassVar[list[HiddenCall]] = []

    @property
    def places(self) -> tuple[str, ...]:
        return (self.at,)

    def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
        self.calls.append(site)
        return None if not self.amount else turned(hidden, self.amount)


def turned(hidden: Tensor, amount: float) -> Tensor:
    return hidden + amount * hidden.roll(1, -1)


@contextlib.contextmanager
def plain_hooks(
    model: nn.Module, kind: Kind, at: str, edit: Callable[[Tensor], Tensor], only: int | None = None
) -> Iterator[None]:
    """The same edit by plain hooks on modules that are found by the names of the table."""
    handles = []

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    for number in range(2):
        if only is not None and number != only:
            continue
        layer = model.get_submodule(kind.layer.format(number))
        path = {"layer": "", "attention": kind.attention, "mlp": kind.mlp, "neurons": kind.neurons}
        module = layer.get_submodule(path[at] or "")
        if at == "neurons":
            handles.append(module.register_forward_pre_hook(lambda m, a: (edit(a[0]), *a[1:])))
        else:
            handles.append(module.register_forward_hook(after))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_every_place_of_every_class(kind: Kind) -> None:
    model, inputs = built(kind)
    plain = out(model, inputs)
    other = copy.deepcopy(model)
    for at in ("layer", "attention", "mlp", "neurons"):
        rule = Turned(at=at, amount=0.5, layers=[1])
        if at == "neurons" and kind.neurons is None:
            with pytest.raises(ab.Refused, match="mixture of experts"), ab.steer(model, rule):
                pass
            continue
        with plain_hooks(other, kind, at, lambda h: turned(h, 0.5), only=1):
            wanted = out(other, inputs)
        with ab.steer(model, rule):
            found = out(model, inputs)
        assert torch.equal(found, wanted), at
        assert off(found, plain) > 1e-3, at
        with ab.steer(model, Turned(at=at, amount=0.0)):
            assert torch.equal(out(model, inputs), plain), at
        assert torch.equal(out(model, inputs), plain), at


@torch.no_grad()
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[11]], ids=["decoder", "vision"])
def test_recorded_states_are_the_edited_ones(kind: Kind) -> None:
    """Also where the model was made to record before the context was entered."""
    model, inputs = built(kind)
    plain = model(**inputs, output_hidden_states=True).hidden_states
    with ab.steer(model, Turned(at="layer", amount=0.5, layers=(0,))):
        found = model(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], turned(plain[1], 0.5))


@torch.no_grad()
def test_states_recorded_before_an_edit_are_refused() -> None:
    """The oldest supported transformers records in a replaced forward, inside our hooks."""
    model, inputs = built(KINDS[0])
    layer: Any = model.get_submodule("model.layers.0")
    stock = layer.forward
    recorded = []

    def wrapped_forward(*args: Any, **kwargs: Any) -> Any:
        recorded.append(stock(*args, **kwargs))
        return recorded[-1]

    layer.forward = wrapped_forward
    words = "records hidden states before they are edited"
    rule = Turned(at="layer", amount=0.5, layers=(0,))
    with pytest.raises(ab.Refused, match=words), ab.steer(model, rule):
        out(model, inputs)
    plain = out(model, inputs)
    with ab.steer(model, Turned(at="mlp", amount=0.5, layers=(0,))):
        found = out(model, inputs)  # inside the forward: what is recorded is edited
    assert off(recorded[-1], recorded[-2]) > 1e-3
    assert off(found, plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_collected_states_are_the_parts_of_a_layer(kind: Kind) -> None:
    """Input + attention + mlp is the layer; the down projection of the neurons is the MLP."""
    model, inputs = built(kind)
    places = ("layer", "attention", "mlp") + (("neurons",) if kind.neurons else ())
    states = collect(model, inputs, at=places)
    found = {(state.site.layer, state.at): state.hidden for state in states}
    assert set(found) == {(layer, place) for layer in range(2) for place in places}
    recorded = model(**inputs, output_hidden_states=True).hidden_states
    assert off(found[0, "layer"], recorded[1]) < 1e-6
    if kind.sums:
        whole = found[0, "layer"] + found[1, "attention"] + found[1, "mlp"]
        assert off(whole, found[1, "layer"]) < 1e-5
    if kind.neurons and "norm" not in kind.mlp and "scale" not in kind.mlp:
        down = model.get_submodule(f"{kind.layer.format(1)}.{kind.neurons}")
        assert off(down(found[1, "neurons"]), found[1, "mlp"]) < 1e-5


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
@torch.no_grad()
def test_both_towers_of_vision_language_models(name: str) -> None:
    subject = MAKERS[name]()
    plain = subject.run()
    outs = []
    for tower in ("text", "vision"):
        for at in ("layer", "neurons"):
            rule = Turned(at=at, amount=0.5, towers=(tower,))
            Turned.calls.clear()
            with ab.steer(subject.model, rule):
                outs.append(subject.run())
            sites = {call.site for call in Turned.calls}
            assert {site.tower for site in sites} == {tower}
            count = sum(site.tower == tower for site in ab.hub.sites(subject.model))
            assert len(sites) == len(Turned.calls) == count
            assert all(call.positions.shape[1] > 4 for call in Turned.calls)
    assert all(off(one, plain) > 1e-3 for one in outs)
    assert torch.equal(subject.run(), plain)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_spans_and_padding(side: str, request: pytest.FixtureRequest) -> None:
    """A rule sees absolute positions: padding is -1, a span is the same tokens on both sides."""
    subject = make("stories", request)
    inputs, positions, _ = padded(subject, side)
    Turned.calls.clear()
    spans = {"part": [(2, 4), (1, 3)]}
    with ab.steer(subject.model, Turned(at="mlp", amount=0.5), spans=spans):
        subject.run(**inputs)
    call = Turned.calls[0]
    assert torch.equal(call.positions.expand_as(positions), positions)
    part = call.where(("part",))
    for row, (start, stop) in enumerate(spans["part"]):
        assert torch.equal(part[row], (positions[row] >= start) & (positions[row] < stop))
    assert torch.equal(call.last, positions.argmax(1))
    assert call.has("part")
    assert call.phase == "prefill"
    assert not call.has("other")


@torch.no_grad()
def test_phases_and_frozen_while_decoding(request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)

    @dataclass(frozen=True, kw_only=True)
    class Frozen(Rule):
        heads: Heads = "all"
        hidden_at: ClassVar[tuple[str, ...]] = ("layer",)
        seen: ClassVar[list[tuple[str, int, float]]] = []

        def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
            kept = site.frozen("sum", lambda: float(hidden.sum()))
            if site.layer == 0:
                self.seen.append((site.phase, int(site.positions[0, -1]), kept))
            return None

    with ab.steer(subject.model, Frozen()):
        subject.model.generate(
            **subject.inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    length = subject.inputs["input_ids"].shape[1]
    assert [one[:2] for one in Frozen.seen] == [
        ("prefill", length - 1),
        *(("decode", length + step) for step in range(3)),
    ]
    assert len({one[2] for one in Frozen.seen}) == 1
    cache = subject.model(**subject.inputs, use_cache=True).past_key_values
    with (
        pytest.raises(ab.Refused, match="run the prefill inside"),
        ab.steer(subject.model, Frozen()),
    ):
        subject.model(input_ids=tokens(2, 1), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("name", ["stories", "vit", "bart decoder", "bart cross", "qwen2_vl"])
def test_the_input_of_a_layer(name: str, request: pytest.FixtureRequest) -> None:
    """`site.hidden` is what the layer was given; without reads_hidden it is refused by name."""
    subject = make(name, request)
    towers = subject.towers

    @dataclass(frozen=True, kw_only=True)
    class Reads(Rule):
        heads: Heads = "all"
        reads_hidden: ClassVar[bool] = True
        seen: ClassVar[dict[int, Tensor]] = {}

        def look(self, site: SiteCall) -> Any:
            self.seen[site.site.layer] = site.hidden.clone()
            return True

    @dataclass(frozen=True, kw_only=True)
    class Forgets(Rule):
        heads: Heads = "all"

        def look(self, site: SiteCall) -> Any:
            return site.hidden

    parts = layers(subject.model)
    tower = towers[0] if towers else next(iter(parts)).tower
    if tower == "cross":
        with (
            pytest.raises(ab.Refused, match="cross"),
            ab.steer(subject.model, Reads(towers=towers)),
        ):
            pass
        return
    given: dict[int, Tensor] = {}
    handles = []
    for site, part in parts.items():
        if site.tower == tower:

            def keep(module: Any, args: Any, kwargs: Any, number: int = site.layer) -> None:
                given[number] = (args[0] if args else kwargs["hidden_states"]).clone()

            handles.append(part.layer.register_forward_pre_hook(keep, with_kwargs=True))
    with ab.steer(subject.model, Reads(towers=towers)):
        subject.run()
    for handle in handles:
        handle.remove()
    assert given.keys() == Reads.seen.keys()
    assert all(torch.equal(Reads.seen[layer], given[layer]) for layer in given)
    with (
        pytest.raises(ab.AttnbiasError, match="reads_hidden = True"),
        ab.steer(subject.model, Forgets(towers=towers)),
    ):
        subject.run()


@dataclass(frozen=True, kw_only=True)
class Append(Rule):
    """Adds a constant token to vision towers."""

    heads: Heads = "all"
    value: float
    count: int = 2
    at_layer: int = 0

    def tokens(self, site: TokenCall, hidden: Tensor) -> Tokens | None:
        if site.layer != self.at_layer:
            return None
        return Tokens(append=torch.full((1, self.count, hidden.shape[2]), self.value))


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in KINDS if "image_size" in k.fields],
                         ids=lambda k: k.model)  # fmt: skip
def test_added_tokens_are_seen_and_gone(kind: Kind) -> None:
    """Added tokens go through all layers; nothing that leaves the layers holds them."""
    model, inputs = built(kind)
    other = copy.deepcopy(model)
    length = out(model, inputs).shape[1]
    first = other.get_submodule(kind.layer.format(0))
    last = other.get_submodule(kind.layer.format(1))

    def longer(module: Any, args: Any, kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        more = torch.full((2, 2, given.shape[2]), 0.7)
        whole = torch.cat([given, more], 1)
        kwargs = dict.fromkeys(kwargs)
        return (whole, *(None for _ in args[1:])), kwargs

    handles = [
        first.register_forward_pre_hook(longer, with_kwargs=True),
        last.register_forward_hook(
            lambda m, a, o: (o[0][:, :length], *o[1:]) if isinstance(o, tuple) else o[:, :length]
        ),
    ]
    wanted = other(**inputs)
    for handle in handles:
        handle.remove()
    plain = model(**inputs, output_hidden_states=True)
    with ab.steer(model, Append(value=0.7)):
        found = model(**inputs, output_hidden_states=True)
    assert off(found.last_hidden_state, wanted.last_hidden_state) < RELATIVE
    assert off(found.pooler_output, wanted.pooler_output) < RELATIVE
    assert off(found.last_hidden_state, plain.last_hidden_state) > 1e-3
    shapes = [tuple(one.shape) for one in found.hidden_states]
    assert shapes == [tuple(one.shape) for one in plain.hidden_states]
    assert torch.equal(found.hidden_states[0], plain.hidden_states[0])
    assert torch.equal(model(**inputs).last_hidden_state, plain.last_hidden_state)
    with ab.steer(model, Append(value=0.7, count=0)):
        assert torch.equal(model(**inputs).last_hidden_state, plain.last_hidden_state)


@torch.no_grad()
def test_a_backbone_gives_feature_maps_of_the_image_alone() -> None:
    from transformers import Dinov2Backbone, Dinov2Config

    config = Dinov2Config(**IMAGE, mlp_ratio=2, out_features=["stem", "stage1", "stage2"])
    model = redraw(Dinov2Backbone(config)).eval()
    inputs = {"pixel_values": pixels()}
    plain = model(**inputs).feature_maps
    with ab.steer(model, Append(value=0.7)):
        found = model(**inputs).feature_maps
    assert [one.shape for one in found] == [one.shape for one in plain]
    assert torch.equal(found[0], plain[0])
    assert off(found[2], plain[2]) > 1e-3


@torch.no_grad()
def test_two_rules_add_tokens_of_their_own() -> None:
    model, inputs = built(KINDS[-4])
    one, two = Append(value=0.7, count=1), Append(value=-0.4, count=2)
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class Own(Rule):
        heads: Heads = "all"
        hidden_at: ClassVar[tuple[str, ...]] = ("layer",)

        def tokens(self, site: TokenCall, hidden: Tensor) -> Tokens | None:
            more = torch.full((1, 1, hidden.shape[2]), 0.1)
            return Tokens(append=more) if site.layer == 0 else None

        def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
            seen.append((site.length, site.added, hidden.shape[1]))
            return None

    with ab.steer(model, one, Own(), two):
        together = out(model, inputs)
    assert seen == [(17, slice(18, 19), 21)] * 2
    with ab.steer(model, one), ab.steer(model, Own()), ab.steer(model, two):
        nested = out(model, inputs)
    assert torch.equal(together, nested)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rule", "words"),
    [
        ("stories", Append(value=1.0), "where every token sees every token"),
        ("minilm", Append(value=1.0), "where every token sees every token"),
        ("qwen2_vl", Append(value=1.0, towers=("vision",)), "masks or positions per token"),
        ("vit", Append(value=1.0, at_layer=1), "before the first layer"),
        ("bart decoder", Turned(at="layer", amount=1.0, towers=("cross",)), "cross-attention"),
    ],
)
def test_refusals(name: str, rule: Rule, words: str, request: pytest.FixtureRequest) -> None:
    subject = make(name, request)
    plain = subject.run()
    with pytest.raises(ab.Refused, match=words) as caught, ab.steer(subject.model, rule):
        subject.run()
    assert "\n" not in str(caught.value)
    assert torch.equal(subject.run(), plain)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "model", "fields", "words"),
    [
        ("BeitConfig", "BeitModel", {**IMAGE, "use_relative_position_bias": True}, "position"),
        (
            "BeitConfig",
            "BeitModel",
            {**IMAGE, "use_shared_relative_position_bias": True},
            "masks or positions per token",
        ),
        ("DINOv3ViTConfig", "DINOv3ViTModel", IMAGE, "masks or positions per token"),
        (
            "SwinConfig",
            "SwinModel",
            {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 2],
             "num_heads": [2, 2], "window_size": 4},
            "every token sees every token",
        ),
    ],
    ids=["beit", "beit shared", "dinov3", "swin"],
)  # fmt: skip
def test_towers_with_positions_in_their_attention_take_no_token(
    config: str, model: str, fields: dict[str, Any], words: str
) -> None:
    """Their hidden states can be edited; an added token would have no place among the others."""
    import transformers

    made = redraw(getattr(transformers, model)(getattr(transformers, config)(**fields))).eval()
    inputs = {"pixel_values": pixels()}
    plain = out(made, inputs)
    with pytest.raises(ab.Refused, match=words), ab.steer(made, Append(value=0.5)):
        out(made, inputs)
    for at in ("layer", "neurons"):
        Turned.calls.clear()
        with ab.steer(made, Turned(at=at, amount=0.5)):
            assert off(out(made, inputs), plain) > 1e-4
        assert len(Turned.calls) == len(layers(made))
    assert torch.equal(out(made, inputs), plain)


@torch.no_grad()
def test_attention_outside_of_any_list_is_no_layer() -> None:
    """A pooling head is left alone; a tower without a list of layers is refused by name."""
    model, inputs = built(KINDS[10])
    vit: Any = model
    plain = out(model, inputs)
    wanted = []
    for pooled in (False, True):
        if pooled:  # one more attention module, which no forward calls
            vit.head = copy.deepcopy(vit.layers[0].attention)
        with ab.steer(model, Turned(at="layer", amount=0.5)):
            wanted.append(out(model, inputs))
    assert torch.equal(*wanted)
    assert off(wanted[0], plain) > 1e-3
    rule = Turned(at="layer", amount=0.5, layers=(2,))
    with pytest.raises(ab.Refused, match=r"head\) is in no list"), ab.steer(model, rule):
        pass
    vit.layers = nn.Sequential(*vit.layers)
    rule = Turned(at="layer", amount=0.5)
    with pytest.raises(ab.Refused, match="is in no list of layers"), ab.steer(model, rule):
        pass


@torch.no_grad()
def test_a_layer_that_is_no_sum_is_refused() -> None:
    """A class that scales what a sub-block adds: known by its names only, and caught."""
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(**TEXT, num_key_value_heads=2, residual_multiplier=0.22)
    model = redraw(GraniteForCausalLM(config)).eval()
    inputs = {"input_ids": tokens()}
    for at in ("mlp", "attention"):
        rule = Turned(at=at, amount=0.5)
        with pytest.raises(ab.Refused, match="does not just add"), ab.steer(model, rule):
            model(**inputs)
    plain = model(**inputs).logits
    with ab.steer(model, Turned(at="layer", amount=0.5)):
        assert off(model(**inputs).logits, plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("wrong", [1.0, torch.zeros(1, 2, 3)])
def test_a_wrong_return_is_refused(wrong: Any) -> None:
    model, inputs = built(KINDS[0])

    @dataclass(frozen=True, kw_only=True)
    class Wrong(Rule):
        heads: Heads = "all"
        hidden_at: ClassVar[tuple[str, ...]] = ("layer",)

        def hidden(self, site: HiddenCall, hidden: Tensor) -> Tensor | None:
            return wrong  # type: ignore[no-any-return]

    words = r"hidden must return the shape \(2, 13, 32\)"
    with pytest.raises(ab.AttnbiasError, match=words), ab.steer(model, Wrong()):
        out(model, inputs)


@torch.no_grad()
def test_a_layer_that_attends_but_hides_its_states_is_refused() -> None:
    """A compiled graph may skip hooks that came later: seen after the forward, and said."""
    model, inputs = built(KINDS[0])
    layer = model.get_submodule("model.layers.1")
    kind = type(layer)

    class Skips(kind):  # type: ignore[valid-type, misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward(*args, **kwargs)

    layer.__class__ = Skips
    rule = Turned(at="layer", amount=0.5)
    with pytest.raises(ab.Refused, match=r"torch\.compiler\.reset"), ab.steer(model, rule):
        out(model, inputs)


def test_gradients_and_checkpointing_go_through_an_edit() -> None:
    model, inputs = built(KINDS[0])
    rule = Turned(at="layer", amount=0.5)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        with ab.steer(model, rule):
            out(model, inputs).square().mean().backward()
        grads.append(model.get_submodule("model.layers.0.mlp.down_proj").weight.grad.clone())
    assert off(grads[1], grads[0]) < RELATIVE
    other = copy.deepcopy(model).eval()
    other.zero_grad()
    with plain_hooks(other, KINDS[0], "layer", lambda h: turned(h, 0.5)):
        out(other, inputs).square().mean().backward()
    wanted = other.get_submodule("model.layers.0.mlp.down_proj").weight.grad
    assert off(grads[0], wanted) < RELATIVE


def test_collect_refuses_in_one_sentence() -> None:
    model, inputs = built(KINDS[0])
    with pytest.raises(ab.AttnbiasError, match="at must be of layer, mlp, attention, neurons"):
        collect(model, inputs, at="heads")
    with pytest.raises(ab.AttnbiasError, match="layer 7, but"):
        collect(model, inputs, layers=(7,))
    with pytest.raises(ab.AttnbiasError, match=r"model\.eval\(\)"):
        collect(model.train(), inputs)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_models_take_every_edit_and_lose_it_again() -> None:
    """Graphs of one context are not those of the next: hooks are looked up when they run."""
    model, inputs = built(KINDS[11])
    plain = out(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(out(compiled, inputs), plain)
    rules = (
        ab.rules.KeyShift(keys=[1], amount=2.0, heads="all"),
        Turned(at="layer", amount=0.5),
        Turned(at="neurons", amount=0.3, layers=(1,)),
        Append(value=0.5),
    )
    for rule in rules:
        with ab.steer(model, rule):
            wanted = out(model, inputs)
        with ab.steer(compiled, rule):
            assert off(out(compiled, inputs), wanted) < RELATIVE
        assert off(wanted, plain) > 1e-3
        assert torch.equal(out(compiled, inputs), plain)
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_dtype_of_the_model_stays(kind: torch.dtype) -> None:
    model, inputs = built(KINDS[11])
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    rules = (
        ab.rules.VTI(directions={0: vector, 1: vector}, strength=20.0),
        ab.rules.PersonaVector(directions={1: vector}, tokens_at="all"),
        ab.rules.TestTimeRegisters(neurons=((0, 1), (1, 2)), scale=60.0),
    )
    wanted = []
    for rule in rules:
        with ab.steer(model, rule):
            wanted.append(out(model, inputs))
    plain = out(model, inputs)
    small = copy.deepcopy(model).to(kind)
    given = {name: value.to(kind) for name, value in inputs.items()}
    for rule, whole in zip(rules, wanted, strict=True):
        with ab.steer(small, rule):
            found = out(small, given)
        assert found.dtype == kind
        assert off(found.float(), whole) < (1e-5 if kind == torch.float64 else 0.02)
        assert off(plain, whole) > 0.03
