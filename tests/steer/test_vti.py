from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.steer.directions import principal
from attnbias.steer.states import collect
from tests.cases.hook import HookCase
from tests.cases.rule import off
from tests.steer.models import MAKERS, Subject, make, pixels

VTI = ab.rules.VTI
# The layers and their last MLP module, by name: independent of how the library finds them.
MLPS = {
    "stories": ("model.layers", "mlp"),
    "mistral": ("model.layers", "mlp"),
    "gpt_oss": ("model.layers", "mlp"),
    "minilm": ("encoder.layer", "output.dense"),
    "vit": ("vit.layers", "mlp"),
    "dinov2": ("dinov2.encoder.layer", "layer_scale2"),
    "bart encoder": ("model.encoder.layers", "fc2"),
    "bart decoder": ("model.decoder.layers", "fc2"),
    "llava": ("model.language_model.layers", "mlp"),
    "qwen2_vl": ("model.language_model.layers", "mlp"),
    "gemma3": ("model.language_model.layers", "post_feedforward_layernorm"),
}


def blocks(model: nn.Module, name: str) -> list[nn.Module]:
    return list(model.get_submodule(MLPS[name][0]))  # type: ignore[call-overload]


def width(subject: Subject) -> int:
    config: Any = subject.model.config
    return int(config.get_text_config().hidden_size)


def drawn(size: int, layer: int, seed: int = 7) -> tuple[float, ...]:
    generator = torch.Generator().manual_seed(seed + layer)
    return tuple((3 * torch.randn(size, generator=generator)).tolist())


@contextlib.contextmanager
def by_hooks(model: nn.Module, name: str, rule: Any) -> Iterator[None]:
    """The released layer after every MLP, or the paper's sum after every block, written out."""

    def edit(whole: Tensor, vector: Tensor) -> Tensor:
        if rule.form == "add":
            return whole + rule.strength * vector
        length = whole.norm(dim=-1, keepdim=True)
        turned = whole / length + 0.1 * rule.strength * vector / vector.norm(dim=-1, keepdim=True)
        return turned / turned.norm(dim=-1, keepdim=True) * length

    handles = []
    for one in rule.directions:
        block = blocks(model, name)[one.layer]
        module = block if rule.form == "add" else block.get_submodule(MLPS[name][1])
        vector = torch.tensor(one.vectors)

        def after(m: Any, a: Any, out: Any, vector: Tensor = vector) -> Any:
            if isinstance(out, tuple):
                return (edit(out[0], vector), *out[1:])
            return edit(out, vector)

        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Case(HookCase):
    zero, small, large = 0.0, 0.9, 12.0
    subjects = tuple(MLPS)
    padding = ("stories", "minilm", "llava")
    generates = ("stories", "qwen2_vl")
    form = "turn"
    size = 32

    def each(self, name: str, request: pytest.FixtureRequest) -> Subject:
        subject = super().each(name, request)
        self.size = width(subject)
        return subject

    def rule(self, strength: float, **where: Any) -> Any:
        directions = {layer: drawn(self.size, layer) for layer in (0, 1)}
        form: Any = self.form
        return VTI(directions=directions, strength=strength, form=form, **where)

    def oracle(
        self, subject: Subject, strength: float, model: Any
    ) -> contextlib.AbstractContextManager[Any]:
        self.size = width(subject)
        return by_hooks(model, subject.name, self.rule(strength))


class TestVTI(_Case):
    __test__ = True


class TestAddition(_Case):
    __test__ = True
    form = "add"
    subjects = ("stories", "vit", "gemma3")


@torch.no_grad()
def test_lengths_stay_and_a_direction_per_token_is_taken() -> None:
    subject = MAKERS["vit"]()
    vectors = torch.randn(17, 32, generator=torch.Generator().manual_seed(3))
    rule = VTI(directions={1: vectors}, strength=30.0)
    before = collect(subject.model, subject.inputs, at="mlp", layers=(1,))[0].hidden
    with ab.steer(subject.model, rule):
        after = collect(subject.model, subject.inputs, at="mlp", layers=(1,))[0].hidden
    assert torch.allclose(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5)
    close = torch.nn.functional.cosine_similarity(after, vectors.expand_as(after), dim=-1)
    assert float(close.min()) > 0.8  # lambda 30: three times the unit vector of every token
    assert off(after, before) > 0.1


# Finding ------------------------------------------------------------------------------------------


def test_principal_components_beside_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).double() + 2
    pca = PCA(n_components=2).fit(rows.numpy())
    found = principal(rows, 2, align=True)
    components = torch.tensor(pca.components_)
    mean = rows.mean(0)
    turned = components * torch.sign(components @ mean)[:, None]
    assert torch.allclose(found, turned.sum(0) + mean)
    plain = principal(rows, 2, align=False) - mean
    scores = (rows - mean) @ components.T
    far = scores.gather(0, scores.abs().argmax(0)[None])[0]
    assert torch.allclose(plain, (components * torch.sign(far)[:, None]).sum(0))


@torch.no_grad()
@pytest.mark.parametrize("pca", ["layer", "joint"])
def test_a_planted_shift_is_recovered(pca: Any, request: pytest.FixtureRequest) -> None:
    """Pairs of inputs whose states after layer 0 differ by one direction and noise."""
    subject = make("stories", request)
    model: Any = subject.model
    size = width(subject)
    generator = torch.Generator().manual_seed(5)
    shift = torch.randn(size, generator=generator)
    # What the shift is on: a token embedding that the unwanted input does not have.
    embeddings = model.get_input_embeddings().weight
    pairs = []
    for _ in range(6):
        ids = torch.randint(3, 90, (1, 9), generator=generator)
        embeds = embeddings[ids]
        moved = embeds.clone()
        moved[:, -1] += 8 * shift + 0.05 * torch.randn(size, generator=generator)
        pairs.append(({"inputs_embeds": moved}, {"inputs_embeds": embeds}))
    rule = VTI(layers=(0, 1, 2, 3)).fit(model, pairs, pca=pca, align=True, progress=False)
    assert rule.fitted is not None
    assert (rule.fitted.pairs, rule.fitted.pca) == (6, pca)
    assert [one.layer for one in rule.directions or ()] == list(range(4))
    first = torch.tensor((rule.directions or ())[0].vectors[0])
    assert float(torch.nn.functional.cosine_similarity(first, shift, dim=0)) > 0.95
    # Beside a plain loop: last token, wanted minus unwanted, per layer.
    rows = []
    for wanted, unwanted in pairs:
        states = [
            model(**one, output_hidden_states=True).hidden_states for one in (wanted, unwanted)
        ]
        rows.append(torch.stack([a[0, -1] - b[0, -1] for a, b in zip(*states, strict=True)])[1:5])
    whole = torch.stack(rows).double()
    mean = whole.mean(0)
    if pca == "joint":
        whole, mean = whole.flatten(1)[:, None], mean.flatten()[None]
    parts = []
    for part in range(whole.shape[1]):
        component = torch.linalg.svd(whole[:, part] - mean[part], full_matrices=False)[2][0]
        parts.append(component * torch.sign(component @ mean[part]) + mean[part])
    wanted_directions = torch.stack(parts).reshape(4, size)
    found = torch.tensor([one.vectors[0] for one in rule.directions or ()]).double()
    assert off(found, wanted_directions) < 1e-3


@torch.no_grad()
def test_visual_fit_has_a_direction_per_token() -> None:
    model: Any = MAKERS["llava"]().model.model.vision_tower  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for image in pixels(3):
        copies = ab.rules.masked_copies(image, 8, copies=5, generator=generator)
        assert copies.shape == (5, 3, 16, 16)
        pairs.append(({"pixel_values": copies}, {"pixel_values": image[None]}))
    rule = VTI().fit(model, pairs, tokens="each", progress=False)
    assert [len(one.vectors) for one in rule.directions or ()] == [5] * 3
    states = [
        [model(**one, output_hidden_states=True).hidden_states[2].mean(0) for one in pair]
        for pair in pairs
    ]
    rows = torch.stack([a - b for a, b in states]).double()
    wanted = torch.stack([principal(rows[:, token], 1, False) for token in range(5)])
    assert off(torch.tensor((rule.directions or ())[1].vectors).double(), wanted) < 1e-4
    whole = MAKERS["llava"]()
    plain = whole.run()
    with ab.steer(whole.model, VTI(directions=rule.directions, towers=("vision",))):
        assert off(whole.run(), plain) > 1e-4


def test_masked_copies_keep_few_patches() -> None:
    image = pixels(1)[0]
    copies = ab.rules.masked_copies(image, 4, share=0.75, copies=3)
    mean = image.mean((1, 2))[:, None, None]
    for copy in copies:
        patches = (copy == mean).reshape(3, 4, 4, 4, 4).all(4).all(2)
        assert int(patches[0].sum()) == 12
        assert torch.equal(torch.where(copy == mean, image, copy), image)
    assert not torch.equal(copies[0], copies[1])


def test_a_fitted_rule_survives_a_recipe(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    ids = subject.inputs["input_ids"]
    pairs = [({"input_ids": ids[:1, n:]}, {"input_ids": ids[1:, n:]}) for n in range(3)]
    rule = VTI(layers=(1, 3)).fit(subject.model, pairs, tokens="mean", progress=False)
    assert [one.layer for one in rule.directions or ()] == [1, 3]
    recipe = ab.Recipe.of(subject.model, rule)
    recipe.save(tmp_path / "recipe.json")
    assert ab.Recipe.load(tmp_path / "recipe.json") == recipe


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"strength": float("inf")}, "strength must be"),
        ({"strength": True}, "strength must be"),
        ({"form": "turned"}, "form must be"),
        ({"heads": [0]}, "heads stays 'all'"),
        ({"directions": {}}, "directions must hold at least one layer"),
        ({"directions": {0: [float("nan")]}}, "directions must go from layer numbers"),
        ({"directions": {-1: [1.0]}}, "directions must go from layer numbers"),
        ({"directions": [(0, [1.0]), (0, [2.0])]}, "each layer once"),
    ],
)
def test_bad_fields(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ab.AttnbiasError, match=words):
        VTI(**fields)


@pytest.mark.parametrize(
    ("directions", "words"),
    [
        (None, r"\.fit\(model, pairs\)"),
        ({9: [1.0]}, "layer 9, but"),
        ({0: [1.0] * 5}, r"shape \(1, 5\)"),
        ({0: [[1.0] * 32] * 4}, r"shape \(4, 32\)"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(directions: Any, words: str) -> None:
    subject = MAKERS["vit"]()
    rule = VTI(directions=directions)
    with pytest.raises(ab.AttnbiasError, match=words), ab.steer(subject.model, rule):
        subject.run()


@pytest.mark.parametrize(
    ("pairs", "options", "words"),
    [
        ([], {}, "at least two pairs.*0 of nothing"),
        ([({}, {})], {}, "at least two pairs.*1 of tuple"),
        (["ab", "cd"], {}, "at least two pairs.*2 of str"),
        (None, {"tokens": "first"}, "tokens must be"),
        (None, {"pca": "all"}, "pca must be"),
        (None, {"rank": 0}, "rank must be"),
    ],
)
def test_fit_refuses_in_one_sentence(pairs: Any, options: dict[str, Any], words: str) -> None:
    subject = MAKERS["vit"]()
    given = [(subject.inputs, subject.inputs)] * 2 if pairs is None else pairs
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        VTI().fit(subject.model, given, progress=False, **options)
    assert "\n" not in str(caught.value)


def test_each_token_needs_equal_lengths(request: pytest.FixtureRequest) -> None:
    subject = make("stories", request)
    ids = subject.inputs["input_ids"]
    pairs = [({"input_ids": ids[:1, n:]}, {"input_ids": ids[1:, n:]}) for n in range(3)]
    with pytest.raises(ab.AttnbiasError, match="the same length"):
        VTI().fit(subject.model, pairs, tokens="each", progress=False)


def test_a_direction_kept_from_inference_serves_training() -> None:
    subject = MAKERS["vit"]()
    rule = VTI(directions={1: drawn(32, 1)}, strength=9.0)
    with torch.inference_mode(), ab.steer(subject.model, rule):
        wanted = subject.run()
    with ab.steer(subject.model, rule):
        found = subject.run()
        found.square().mean().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(found, wanted)
    assert all(p.grad is not None for p in subject.model.get_submodule("vit.layers").parameters())
