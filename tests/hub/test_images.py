"""Spans of images and videos: exactly their tokens, in prompts that we build and in any inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias import AttnbiasError
from tests.hub.processors import picture, processor, tokenizer
from tests.steer.models import MAKERS, VLMS, Subject

QUESTION = "what is in the picture ?"
DOCUMENTS = ["a red dog sits .", "a blue cat ."]
SOFT = {"llava": "<image>", "qwen2_vl": "<|image_pad|>", "gemma3": "<soft>"}


def subject(name: str) -> Subject:
    """The subject of this name, whose config names the tiny tokenizer's signs."""
    found = MAKERS[name]()
    words = processor(name).tokenizer
    found.model.config.image_token_id = words.convert_tokens_to_ids(SOFT[name])
    found.model.config.video_token_id = words.convert_tokens_to_ids("<|video_pad|>")
    return found


def words_of(made: Any, name: str) -> str:
    start, stop = made.spans[name]
    return " ".join(made.tokens[start:stop])


@pytest.mark.parametrize("name", VLMS)
def test_every_part_is_its_own_tokens(name: str) -> None:
    images = [picture(0), picture(1, 16, 32)]
    made = ab.prompt(
        processor(name), QUESTION, documents=DOCUMENTS, system="you are a cat", images=images
    )
    assert words_of(made, "question") == QUESTION
    assert [words_of(made, f"document {k}") for k in (0, 1)] == DOCUMENTS
    assert words_of(made, "system") == "you are a cat"
    sizes = [4, 8] if name == "qwen2_vl" else [4, 4]  # its images keep their shape
    for k, size in enumerate(sizes):
        assert words_of(made, f"image {k}").split() == [SOFT[name]] * size
    assert made.spans["image"] == (made.spans["image 0"][0], made.spans["image 1"][1])
    assert made.spans["image"][1] <= made.spans["document 0"][0]
    assert made.tokens.count(SOFT[name]) == sum(sizes)
    assert made.spans["generated"] == (len(made.tokens), None)


@pytest.mark.parametrize("name", VLMS)
@torch.no_grad()
def test_inputs_are_what_the_processor_makes_and_run(name: str) -> None:
    """Ids and pixels of the template; a rule on "image" is the rule on its positions."""
    image = picture(3)
    made = ab.prompt(processor(name), QUESTION, image=image)
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    wanted = processor(name).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert made.inputs.keys() >= {"input_ids", "attention_mask", "pixel_values"}
    for key, value in made.inputs.items():
        if key in wanted:
            assert torch.equal(value, wanted[key]), key
    model = subject(name).model
    found = []
    for keys in ("image", range(*made.spans["image"]), range(1, 3)):
        rule = ab.rules.KeyShift(keys=keys, factor=4.0, heads="all", towers=["text"])
        with ab.steer(model, rule, spans=made.spans):
            found.append(model(**made.inputs).logits)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2], atol=1e-3)
    assert not torch.allclose(found[0], model(**made.inputs).logits, atol=1e-3)


@pytest.mark.parametrize("name", VLMS)
def test_spans_of_ready_inputs_are_those_of_the_prompt(name: str) -> None:
    model = subject(name).model
    made = ab.prompt(processor(name), QUESTION, images=[picture(0), picture(1)])
    found = ab.spans(model, made.inputs)
    assert found == {key: made.spans[key] for key in ("image 0", "image 1", "image", "generated")}


@pytest.mark.parametrize("name", VLMS)
def test_a_text_alone_goes_through_the_processors_template(name: str) -> None:
    """Its template takes lists of pieces; the tokens are those of the processor itself."""
    tool = processor(name)
    found = ab.prompt(tool, "who are you ?", documents=["a dog sits"])
    chat = [{"role": "user", "content": [{"type": "text", "text": "a dog sits\n\nwho are you ?"}]}]
    text = tool.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert found.text == text
    options = {"tokenize": True, "add_generation_prompt": True, "return_tensors": "pt"}
    own = tool.apply_chat_template(chat, return_dict=True, **options)["input_ids"]
    assert torch.equal(found.inputs["input_ids"], own)
    start, stop = found.spans["document 0"]
    assert found.tokens[start:stop] == ["a", "dog", "sits"]
    assert "image" not in found.spans


def test_a_video() -> None:
    made = ab.prompt(processor("qwen2_vl"), QUESTION, video=[picture(k) for k in range(4)])
    assert words_of(made, "video").split() == ["<|video_pad|>"] * 8
    assert made.spans["video"] == made.spans["video 0"]
    found = ab.spans(subject("qwen2_vl").model, made.inputs)
    assert found["video"] == made.spans["video"]
    assert "image" not in found


def test_images_that_touch_are_told_apart_by_grid_or_size() -> None:
    llava, qwen = subject("llava").model, subject("qwen2_vl").model
    image = llava.config.image_token_id
    ids = torch.tensor([[5, *[image] * 8, 6]])
    assert ab.spans(llava, {"input_ids": ids}) == {
        "image 0": (1, 5),
        "image 1": (5, 9),
        "image": (1, 9),
        "generated": (10, None),
    }
    ids = torch.tensor([[5, *[qwen.config.image_token_id] * 12]])
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    found = ab.spans(qwen, {"input_ids": ids, "image_grid_thw": grid})
    assert (found["image 0"], found["image 1"]) == ((1, 5), (5, 13))


def test_rows_with_padding_and_without_an_image() -> None:
    """Positions count real tokens, as rules do."""
    model = subject("llava").model
    image = model.config.image_token_id
    ids = torch.tensor([[0, 0, 5, *[image] * 4, 6], [5, 6, *[image] * 4, 7, 8], [0] * 6 + [5, 6]])
    mask = torch.ones_like(ids)
    mask[0, :2] = mask[2, :6] = 0
    found = ab.spans(model, {"input_ids": ids, "attention_mask": mask})
    assert found["image"] == [(1, 5), (2, 6), None]
    assert found["generated"] == [(6, None), (8, None), (2, None)]


def test_a_file_and_a_text_without_template(tmp_path: Path) -> None:
    import copy

    picture(5).save(tmp_path / "one.png")
    plain = copy.copy(processor("llava"))
    plain.chat_template = None
    made = ab.prompt(plain, QUESTION, image=tmp_path / "one.png")
    other = ab.prompt(processor("llava"), QUESTION, image=picture(5))
    assert made.tokens[:5] == ["<s>", *["<image>"] * 4]
    assert words_of(made, "question") == QUESTION
    assert torch.equal(made.inputs["pixel_values"], other.inputs["pixel_values"])


def test_refusals(tmp_path: Path) -> None:
    llava = processor("llava")
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (tokenizer(), QUESTION, {"image": picture()}, "image= needs the model's processor"),
        (llava, QUESTION, {"video": [picture()]}, "video= needs the model's processor"),
        (llava, QUESTION, {"image": picture(), "images": [picture()]}, "image= or images=, got"),
        (llava, QUESTION, {"images": "a.png"}, "images must be a list"),
        (llava, QUESTION, {"image": tmp_path / "none.png"}, "image must be a readable file"),
        (llava, "a <image> of a cat", {"image": picture()}, "the part 'question' holds '<image>'"),
        (llava, [{"role": "system", "content": "you"}], {"image": picture()}, "a user message"),
        (llava, QUESTION, {"image": object()}, "LlavaProcessor refused the prompt"),
    ]
    for made, messages, given, words in cases:
        with pytest.raises(AttnbiasError, match=words) as caught:
            ab.prompt(made, messages, **given)
        assert "\n" not in str(caught.value)
    with pytest.raises(AttnbiasError, match="names no image token"):
        ab.spans(MAKERS["mistral"]().model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(AttnbiasError, match="must hold input_ids"):
        ab.spans(subject("llava").model, {"pixel_values": torch.ones(1)})
