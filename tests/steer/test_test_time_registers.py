from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.steer.states import collect
from experiments import test_time_registers as experiment
from tests.cases.hook import HookCase
from tests.cases.rule import RELATIVE, off
from tests.steer.models import MAKERS, Subject, make, pixels, redraw

Registers = ab.rules.TestTimeRegisters
NEURONS = ((0, 3), (1, 5), (1, 17), (2, 0))
PATHS = {
    "vit": ("vit.layers", "mlp.fc2"),
    "dinov2": ("dinov2.encoder.layer", "mlp.fc2"),
    "clip vision": ("encoder.layers", "mlp.fc2"),
    "llava": ("model.vision_tower.encoder.layers", "mlp.fc2"),
    "swiglu": ("encoder.layer", "mlp.down_proj"),
    "siglip": ("encoder.layers", "mlp.fc2"),
}


@contextlib.contextmanager
def by_hooks(model: nn.Module, name: str, rule: Registers, tokens: int) -> Iterator[None]:
    """The published edit, image by image and neuron by neuron, by hooks on named modules."""
    path, down = PATHS[name]
    blocks = list(model.get_submodule(path))  # type: ignore[call-overload]
    count = rule.num_registers

    def longer(module: Any, args: Any, kwargs: Any) -> Any:
        whole = torch.cat([args[0], torch.zeros(len(args[0]), count, args[0].shape[2])], 1)
        return (whole, *(None for _ in args[1:])), dict.fromkeys(kwargs)

    def moved(number: int) -> Any:
        units = [unit for layer, unit in rule.neurons or () if layer == number]

        def edit(module: Any, args: Any) -> Any:
            new = args[0].clone()
            for image in range(len(new)):
                peaks = {}
                for unit in units:
                    group = units if rule.peak == "layer" else [unit]
                    values = [float(v) for one in group for v in args[0][image, :, one]]
                    peaks[unit] = max(values, key=abs)
                for unit in units:
                    patches = args[0][image, rule.prefix : tokens, unit]
                    if rule.rest == "zero":
                        kept = torch.zeros_like(patches)
                    elif rule.rest == "mean":
                        kept = torch.full_like(patches, float(patches.mean()))
                    elif rule.rest == "outliers":
                        line = patches.mean() + patches.std()
                        kept = torch.stack([v if v <= line else patches.mean() for v in patches])
                    else:
                        kept = patches
                    new[image, rule.prefix : tokens, unit] = kept
                    new[image, tokens:, unit] = rule.scale * peaks[unit]
            return (new,)

        return edit

    def shorter(module: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, :tokens], *output[1:])
        return output[:, :tokens]

    handles = [blocks[0].register_forward_pre_hook(longer, with_kwargs=True)]
    for number, block in enumerate(blocks):
        module = block.get_submodule(down)
        handles.append(module.register_forward_pre_hook(moved(number)))
    handles.append(blocks[-1].register_forward_hook(shorter))
    if name == "llava":  # it reads the states before the last layer

        def cut(module: Any, args: Any, output: Any) -> None:
            kept = (one if one is None else one[:, :tokens] for one in output.hidden_states)
            output.hidden_states = tuple(kept)

        handles.append(model.get_submodule("model.vision_tower").register_forward_hook(cut))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def length(name: str) -> int:
    return 5 if name == "llava" else 17


class TestTestTimeRegisters(HookCase):
    __test__ = True
    zero, small, large = None, 1.0, 20.0
    subjects = ("vit", "dinov2", "clip vision", "llava")
    padding = ()  # towers without masks: there is no padding, and nothing is decoded in them
    caches = ()
    generates = ("llava",)

    def rule(self, strength: Any, **where: Any) -> ab.rules.TestTimeRegisters:
        if strength is None:
            return Registers(neurons=NEURONS, num_registers=0, rest="same", **where)
        return Registers(neurons=NEURONS, scale=strength, **where)

    def where(self, subject: Subject) -> dict[str, Any]:
        return {"towers": ("vision",)} if subject.name == "llava" else {}

    def oracle(
        self, subject: Subject, strength: Any, model: Any
    ) -> contextlib.AbstractContextManager[Any]:
        return by_hooks(model, subject.name, self.rule(strength), length(subject.name))


@torch.no_grad()
@pytest.mark.parametrize("rest", ["zero", "mean", "outliers", "same"])
@pytest.mark.parametrize("peak", ["layer", "neuron"])
def test_every_form_is_its_equation(peak: Any, rest: Any) -> None:
    subject = MAKERS["vit"]()
    for count, prefix in ((1, 1), (3, 1), (2, 0)):
        rule = Registers(
            neurons=NEURONS, peak=peak, rest=rest, num_registers=count, prefix=prefix, scale=5.0
        )
        with ab.steer(subject.model, rule):
            found = subject.run()
        model = subject.eager()
        with by_hooks(model, "vit", rule, 17):
            wanted = subject.run(model)
        assert off(found, wanted) < RELATIVE
        assert off(found, subject.run()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("name", "prefix", "tokens"), [("swiglu", 1, 17), ("siglip", 0, 16)])
def test_gated_units_and_towers_without_cls(name: str, prefix: int, tokens: int) -> None:
    """The hidden units of a gated MLP are the products that its down projection reads."""
    import transformers

    fields = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    fields |= {"image_size": 16, "patch_size": 4}
    if name == "swiglu":
        config: Any = transformers.Dinov2Config(**fields, mlp_ratio=2, use_swiglu_ffn=True)
        made: Any = transformers.Dinov2Model(config)
    else:
        config = transformers.SiglipVisionConfig(**fields, intermediate_size=48)
        made = transformers.SiglipVisionModel(config)
    model = redraw(made).eval()
    subject = Subject(name, model, {"pixel_values": pixels()})
    rule = Registers(neurons=NEURONS, scale=20.0, prefix=prefix, num_registers=2)
    with ab.steer(model, rule):
        found = subject.run()
    other = subject.eager()
    with by_hooks(other, name, rule, tokens):
        wanted = subject.run(other)
    assert found.shape[1] == tokens
    assert off(found, wanted) < RELATIVE
    assert off(found, subject.run()) > 1e-3


@torch.no_grad()
def test_any_batch_size_gives_the_same() -> None:
    subject = MAKERS["dinov2"]()
    images = torch.cat([pixels(3), 3 * pixels(2)])
    rule = Registers(neurons=NEURONS, scale=20.0)
    with ab.steer(subject.model, rule):
        whole = subject.run(pixel_values=images)
        parts = [subject.run(pixel_values=images[a:b]) for a, b in ((0, 1), (1, 4), (4, 5))]
    assert off(torch.cat(parts), whole) < RELATIVE


@torch.no_grad()
def test_pooling_does_not_see_the_added_token() -> None:
    """DINOv2's classifier reads CLS and the mean of the patches: of the image's own tokens."""
    subject = MAKERS["dinov2"]()
    model: Any = subject.model
    rule = Registers(neurons=NEURONS, scale=20.0, num_registers=4)
    with ab.steer(model, rule):
        found = model(**subject.inputs, output_hidden_states=True)
        last = model.dinov2(**subject.inputs).last_hidden_state
    assert last.shape[1] == 17
    wanted = model.classifier(torch.cat([last[:, 0], last[:, 1:].mean(1)], -1))
    assert off(found.logits, wanted) < 1e-6
    assert [one.shape[1] for one in found.hidden_states] == [17] * 4


@torch.no_grad()
def test_cls_keeps_its_activations_and_the_register_takes_the_rest() -> None:
    subject = MAKERS["vit"]()
    rule = Registers(neurons=((1, 5), (1, 9)))
    seen: dict[str, Tensor] = {}
    down = subject.model.get_submodule("vit.layers.1.mlp.fc2")
    act = subject.model.get_submodule("vit.layers.1.mlp.activation_fn")
    handles = [
        act.register_forward_hook(lambda m, a, o: seen.update(before=o.clone())),
        down.register_forward_hook(lambda m, a, o: seen.update(after=a[0].clone())),
    ]
    with ab.steer(subject.model, rule):
        subject.run()
    for handle in handles:
        handle.remove()
    before, after = seen["before"], seen["after"]
    assert before.shape == after.shape == (2, 18, 48)
    assert torch.equal(after[:, 0], before[:, 0])
    assert bool((after[:, 1:17, [5, 9]] == 0).all())
    for image in range(2):
        values = before[image][:, [5, 9]].flatten()
        assert torch.equal(after[image, 17, [5, 9]], values[values.abs().argmax()].expand(2))
    others = [unit for unit in range(48) if unit not in (5, 9)]
    assert torch.equal(after[..., others], before[..., others])


# Finding ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted() -> experiment.Planted:
    return experiment.planted(0)


def test_the_planted_neurons_are_found_among_decoys(planted: experiment.Planted) -> None:
    """With a threshold that is found or given, whatever the batches; the record says how."""
    fit = {"top_k": 3, "detect_layer": -2, "progress": False}
    images = planted.train[:60]
    one = Registers().fit(planted.model, images, **fit)
    assert set(one.neurons or ()) == set(planted.neurons)
    two = Registers().fit(planted.model, [images[:7], {"pixel_values": images[7:]}], **fit)
    three = Registers().fit(planted.model, images, threshold=20.0, highest_layer=1, **fit)
    assert set(two.neurons or ()) == set(three.neurons or ()) == set(planted.neurons)
    record = one.fitted
    assert record is not None
    assert record.images == 60
    assert record.marked > 50
    assert record.threshold == pytest.approx(3 * record.median)
    assert (record.detect_layer, record.highest_layer) == (2, 2)
    assert two.fitted is not None
    assert two.fitted.scores == pytest.approx(record.scores, rel=1e-5)
    with ab.steer(planted.model, one):
        planted.model(planted.test[:2])


@torch.no_grad()
@pytest.mark.parametrize("sparse", [False, True])
def test_scores_are_those_of_a_loop(planted: experiment.Planted, sparse: bool) -> None:
    """Mean absolute activation on outliers, over images that have some: neuron by neuron."""
    images, line = planted.train[:6], 12.0
    rule = Registers().fit(
        planted.model,
        images,
        top_k=40,
        threshold=line,
        detect_layer=-2,
        highest_layer=1,
        sparse=sparse,
        progress=False,
    )
    sums: dict[tuple[int, int], float] = {}
    marked = 0
    for image in images:
        states = collect(planted.model, {"pixel_values": image[None]}, at=("layer", "neurons"))
        found = {(s.site.layer, s.at): s.hidden[0] for s in states}
        outliers = [t for t in range(1, 17) if float(found[2, "layer"][t].norm()) > line]
        marked += bool(outliers)
        for layer in (0, 1):
            values = found[layer, "neurons"]
            for unit in range(64):
                score = sum(abs(float(values[t, unit])) for t in outliers) / max(len(outliers), 1)
                if sparse and int((values[:, unit] < 0.5).sum()) < 0.5 * 17:
                    score = 0.0
                sums[layer, unit] = sums.get((layer, unit), 0.0) + score
    assert marked
    best = sorted(sums, key=lambda place: -sums[place])[:40]
    assert rule.fitted is not None
    assert rule.fitted.marked == marked
    assert rule.fitted.scores == pytest.approx([sums[place] / marked for place in best], rel=1e-4)
    assert len(set(rule.neurons or ()) & set(best)) >= 39  # ties may stand in another order


def test_the_tower_of_a_larger_model_is_found_by_pixels_alone() -> None:
    model: Any = MAKERS["llava"]().model
    fit = {"top_k": 2, "threshold": 0.1, "progress": False}
    one = Registers().fit(model, pixels(), **fit)
    inputs = MAKERS["llava"]().inputs
    two = Registers(towers=("vision",)).fit(model, [inputs], **fit)
    assert one.neurons == two.neurons
    with ab.steer(model, two):
        model(**inputs)


def test_a_fitted_rule_survives_a_recipe(planted: experiment.Planted, tmp_path: Path) -> None:
    rule = Registers().fit(
        planted.model, planted.train[:5], top_k=2, detect_layer=-2, progress=False
    )
    recipe = ab.Recipe.of(planted.model, rule)
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe


# Refusals -----------------------------------------------------------------------------------------


def test_unfitted_is_refused_with_the_line_to_run() -> None:
    model = MAKERS["vit"]().model
    with pytest.raises(ab.Refused, match=r"\.fit\(model, images\)"), ab.steer(model, Registers()):
        pass


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"neurons": []}, "neurons must be pairs"),
        ({"neurons": [(1,)]}, "neurons must be pairs"),
        ({"neurons": [(1, -2)]}, "neurons must be pairs"),
        ({"num_registers": -1}, "num_registers must be"),
        ({"prefix": 1.5}, "prefix must be"),
        ({"scale": float("nan")}, "scale must be"),
        ({"peak": "token"}, "peak must be"),
        ({"rest": "half"}, "rest must be"),
        ({"heads": [0]}, "heads and layers stay 'all'"),
        ({"layers": [0]}, "heads and layers stay 'all'"),
    ],
)
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words):
        Registers(**fields)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("vit", {"neurons": [(7, 0)]}, "layer 7, but"),
        ("vit", {"neurons": [(1, 48)]}, "neuron 48 of vision layer 1"),
        ("llava", {"neurons": [(1, 0)]}, "names no tower"),
        ("stories", {"neurons": [(1, 0)]}, "where every token sees every token"),
        ("gpt_oss", {"neurons": [(1, 0)]}, "mixture of experts"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    name: str, fields: Any, words: str, request: pytest.FixtureRequest
) -> None:
    subject = make(name, request)
    with pytest.raises(ab.AttnbiasError, match=words), ab.steer(subject.model, Registers(**fields)):
        subject.run()


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        ([], {}, "fit needs images"),
        (torch.zeros(3, 16, 16), {}, r"images must be.*got shape \(3, 16, 16\)"),
        (["a"], {}, "images must be.*got str"),
        (pixels(), {"top_k": 0}, "top_k must be"),
        (pixels(), {"detect_layer": 3}, "detect_layer must be"),
        (pixels(), {"highest_layer": -4}, "highest_layer must be"),
        (pixels(), {"threshold": 1e6}, "no patch of 2 images"),
        (pixels(), {}, "no patch stands out"),
    ],
)
def test_fit_refuses_in_one_sentence(images: Any, options: dict[str, Any], words: str) -> None:
    model = MAKERS["vit"]().model
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        Registers().fit(model, images, progress=False, **options)
    assert "\n" not in str(caught.value)


def test_fit_refuses_a_model_in_training() -> None:
    model = redraw(MAKERS["vit"]().model).train()
    with pytest.raises(ab.AttnbiasError, match=r"model\.eval\(\)"):
        Registers().fit(model, pixels(), progress=False)
