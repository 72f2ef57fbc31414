from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

import attnbias as ab
from tests.cases.rule import RELATIVE, RuleCase, off
from tests.steer.dense import DenseEdit, Map, rewritten
from tests.steer.models import IMAGE, Subject, make, redraw, sharpen

LOCAL, SUMMARY = (1, 8), (8, 10)


def raised(found: Map, strength: Tensor) -> Tensor:
    """The published edit: raw scores plus strength times their size in the last row."""
    scores = found.scores
    rows = found.probabilities.shape[2]
    last = found.last if rows in (1, found.probabilities.shape[3]) else None
    if last is None:
        last = (torch.arange(rows) == rows - 1)[None]
    rise = torch.where(scores > -torch.inf, scores.abs(), 0.0) * strength[:, None, None]
    new = torch.where(last[:, None, :, None], scores + rise, scores)
    # The sink's logit stays: the sum of a row is what it was times how its keys have grown.
    blind = (scores == -torch.inf).all(-1, keepdim=True)
    top = torch.where(blind, 0.0, scores.amax(-1, keepdim=True))
    weights, before = (new - top).exp(), (scores - top).exp()
    total = before.sum(-1, keepdim=True) / (1 - found.rest)
    grown = total + (weights - before).sum(-1, keepdim=True)
    return torch.where(blind, found.probabilities, weights / grown)


class TestPAINT(RuleCase):
    """With tokens that are given; a token in both sets is summary alone."""

    __test__ = True
    zero, small, large = 0.0, 0.3, 2.0

    def rule(self, strength: float, **where: Any) -> ab.rules.PAINT:
        return ab.rules.PAINT(
            alpha=strength, beta=2 * strength, local=LOCAL, summary=SUMMARY, **where
        )

    def dense(self, strength: float) -> Callable[[Map], Tensor]:
        def rewrite(found: Map) -> Tensor:
            local = torch.isin(found.positions, torch.tensor(LOCAL))
            summary = torch.isin(found.positions, torch.tensor(SUMMARY))
            factor = strength * local.double() * ~summary + 2 * strength * summary.double()
            return raised(found, factor)

        return rewrite


# The vision tower's choice ------------------------------------------------------------------------

PATCHES = 36


def images(rows: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 24, 24, generator=generator)


def words(rows: int = 2, images: int = 1) -> Tensor:
    """Two words, an image, (three words, an image,) four words."""
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(3, 90, (rows, 9), generator=generator)
    image = torch.full((rows, PATCHES), IMAGE)
    parts = [text[:, :2], image]
    parts += [text[:, 2:5], image] if images == 2 else []
    return torch.cat([*parts, text[:, 5:]], 1)


@pytest.fixture
def llava() -> Subject:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
    }
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 24, "patch_size": 4}
        | sizes,
        text_config={"model_type": "llama", "vocab_size": 97, "num_key_value_heads": 2}
        | {"tie_word_embeddings": False}  # tied and random, it says its last word again
        | sizes,
        tie_word_embeddings=False,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=PATCHES,
    )
    model = sharpen(redraw(LlavaForConditionalGeneration(config)).eval(), 4.0)
    inputs = {"input_ids": words(), "pixel_values": images(2)}
    return Subject("llava", model, inputs, ("text",))


def choice(model: Any, pixels: Tensor, share: float = 0.25) -> tuple[Tensor, Tensor]:
    """Local and summary patches by the maps of the eager vision tower and numpy's quartiles."""
    tower = model.model.vision_tower
    maps = tower(pixels, output_attentions=True).attentions
    local = torch.zeros(len(pixels), PATCHES, dtype=torch.bool)
    summary = torch.zeros_like(local)
    for number in range(len(pixels)):
        first = maps[0][number, :, 0, 1:].sum(0)
        local[number, first.argsort(descending=True)[: int(PATCHES * share)]] = True
        last = maps[-2][number, :, 0, 1:].sum(0).double().numpy()
        low, high = numpy.percentile(last, 25), numpy.percentile(last, 75)
        summary[number] = torch.from_numpy(last > high + 1.5 * (high - low))
    return local & ~summary, summary


def dense(local: Tensor, summary: Tensor, starts: list[int], keys: int) -> Callable[[Map], Tensor]:
    def rewrite(found: Map) -> Tensor:
        strength = torch.zeros(local.shape[0], keys, dtype=torch.double)
        for start in starts:
            strength[:, start : start + PATCHES] = local * 0.7 + summary * 0.3
        return raised(found, strength[:, : found.scores.shape[-1]])

    return rewrite


@torch.no_grad()
def test_the_vision_tower_chooses(llava: Subject) -> None:
    """Prefill and later steps edit what the maps of the image's own forward say, image by image."""
    rule = ab.rules.PAINT(heads="all", layers=[1, 2], towers=("vision", "text"))
    plain = llava.run()
    spans = {"image": (2, 2 + PATCHES)}
    eager = llava.eager()
    local, summary = choice(eager, llava.inputs["pixel_values"])
    assert summary.any(1).all()  # there is something of both kinds in both images
    assert not torch.equal(local[0], local[1])
    more = torch.tensor([[5, 6], [7, 8]])

    def run(model: Any) -> Tensor:
        first = model(**llava.inputs, use_cache=True)
        parts = [first.logits]
        for number in range(2):
            step = model(
                input_ids=more[:, number : number + 1], past_key_values=first.past_key_values
            )
            parts.append(step.logits)
        return torch.cat(parts, 1)

    with ab.steer(llava.model, rule, spans=spans):
        found = run(llava.model)
    edit = DenseEdit(dense(local, summary, [2], 99), layers=[1, 2], towers=("text",))
    with rewritten(eager, [edit], lambda keys: torch.arange(keys)[None]):
        wanted = run(eager)
    assert off(found, wanted) < RELATIVE
    assert off(run(llava.model), wanted) > 30 * RELATIVE
    # Only the last query of the prompt is edited.
    length = plain.shape[1]
    assert torch.equal(found[:, : length - 1], plain[:, :-1])
    # Swapped sets, or the other image's, would be seen.
    for wrong in (dense(summary, local, [2], 99), dense(local.flip(0), summary.flip(0), [2], 99)):
        edit = DenseEdit(wrong, layers=[1, 2], towers=("text",))
        with rewritten(eager, [edit], lambda keys: torch.arange(keys)[None]):
            assert off(found, run(eager)) > 10 * RELATIVE


@torch.no_grad()
def test_several_images_of_a_row(llava: Subject) -> None:
    rule = ab.rules.PAINT(heads="all", towers=("vision", "text"), image=("image 0", "image 1"))
    ids, pixels = words(1, images=2), images(2)
    starts = [2, 2 + PATCHES + 3]
    spans = {f"image {n}": (start, start + PATCHES) for n, start in enumerate(starts)}
    with ab.steer(llava.model, rule, spans=spans):
        found = llava.model(input_ids=ids, pixel_values=pixels).logits
    eager = llava.eager()
    local, summary = choice(eager, pixels)

    def rewrite(map_: Map) -> Tensor:
        strength = torch.zeros(1, map_.scores.shape[-1], dtype=torch.double)
        for number, start in enumerate(starts):
            part = local[number] * 0.7 + summary[number] * 0.3
            strength[:, start : start + PATCHES] = part
        return raised(map_, strength)

    positions = torch.arange(ids.shape[1])[None]
    with rewritten(eager, [DenseEdit(rewrite, towers=("text",))], positions):
        wanted = eager(input_ids=ids, pixel_values=pixels).logits
    assert off(found, wanted) < RELATIVE


@torch.no_grad()
def test_generate_and_a_prompt_in_parts(llava: Subject) -> None:
    """A part of the prompt that comes later keeps the choice; a new text without image has none."""
    rule = ab.rules.PAINT(heads="all", towers=("vision", "text"), alpha=3.0, beta=3.0)
    spans = {"image": (2, 2 + PATCHES)}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with ab.steer(llava.model, rule, spans=spans):
        found = torch.stack(llava.model.generate(**llava.inputs, **options).scores)
        first = llava.model(**llava.inputs, use_cache=True)
        later = llava.model(
            input_ids=torch.tensor([[5, 6], [7, 8]]), past_key_values=first.past_key_values
        ).logits
        text = torch.arange(3, 53)[None]
        alone = llava.model(input_ids=text).logits
    plain = torch.stack(llava.model.generate(**llava.inputs, **options).scores)
    assert off(found, plain) > 30 * RELATIVE
    eager = llava.eager()
    local, summary = choice(eager, llava.inputs["pixel_values"])
    edit = DenseEdit(
        lambda found: raised(
            found,
            torch.nn.functional.pad(3.0 * (local | summary), (2, found.scores.shape[-1] - 38)),
        ),
        towers=("text",),
    )
    with rewritten(eager, [edit], lambda keys: torch.arange(keys)[None]):
        wanted = torch.stack(eager.generate(**llava.inputs, **options).scores)
        assert off(found, wanted) < RELATIVE
        first = eager(**llava.inputs, use_cache=True)
        wanted = eager(
            input_ids=torch.tensor([[5, 6], [7, 8]]), past_key_values=first.past_key_values
        ).logits
    assert off(later, wanted) < RELATIVE
    assert torch.equal(alone, llava.model(input_ids=text).logits)


def test_what_is_refused(llava: Subject, request: pytest.FixtureRequest) -> None:
    for fields, words_ in (
        ({"alpha": -1.0}, "alpha must be a finite number from 0"),
        ({"beta": float("inf")}, "beta must be"),
        ({"share": 0}, "share must be above 0"),
        ({"local": [1]}, "local and summary together"),
        ({"image": []}, "keys must name"),
    ):
        with pytest.raises(ab.AttnbiasError, match=words_):
            ab.rules.PAINT(heads="all", **fields)
    rule = ab.rules.PAINT(heads="all", towers=("text",))
    with (
        pytest.raises(ab.Refused, match="towers="),
        ab.steer(llava.model, rule, spans={"image": (2, 38)}),
    ):
        pass
    rule = ab.rules.PAINT(heads="all", towers=("vision", "text"))
    with pytest.raises(ab.AttnbiasError, match="the span 'image'"), ab.steer(llava.model, rule):
        pass
    with (
        pytest.raises(ab.Refused, match="70 tokens in image and 72 patches"),
        ab.steer(llava.model, rule, spans={"image": (2, 37)}),
    ):
        llava.run()
    subject = make("qwen2_vl", request)  # no class token, and four patches to a token
    with (
        pytest.raises(ab.Refused, match="give local= and summary="),
        ab.steer(subject.model, rule, spans=subject.spans),
    ):
        subject.run()
