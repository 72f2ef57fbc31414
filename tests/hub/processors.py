"""Tiny processors of models with images, made here: no file is read."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

WORDS = (
    "what is in the picture a red blue dog cat sits on mat and who are you user assistant system"
)
TEMPLATES = {
    "llava": (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
        "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    ),
    "qwen2_vl": (
        "{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ c['text'] }}{% endif %}{% endfor %} {% endfor %}"
        "{% if add_generation_prompt %}assistant : {% endif %}"
    ),
    "gemma3": (
        "<s>{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<boi>{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
        "{% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
    ),
}
SIGNS = ["<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<boi>"]
SIGNS += ["<eoi>", "<soft>"]


def tokenizer(**named: str) -> Any:
    """Words of a small vocabulary, numbers for the rest of the characters, ``<s>`` in front."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "\n\n", ":", ".", "?", *WORDS.split(), *SIGNS]
    made = Tokenizer(models.WordLevel({w: k for k, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[.:?]"), "isolated"),
            pre_tokenizers.Split(Regex(r" +"), "removed"),
        ]
    )
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=named,
    )
    found.add_special_tokens(
        {"additional_special_tokens": SIGNS}, replace_extra_special_tokens=False
    )
    return found


@functools.cache
def processor(name: str) -> Any:
    """The processor of the subject of this name (`tests.steer.models`)."""
    import transformers as hf

    square = {"height": 16, "width": 16}
    if name == "llava":
        image = hf.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square)
        return hf.LlavaProcessor(
            image,
            tokenizer(image_token="<image>"),
            patch_size=8,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=TEMPLATES[name],
        )
    if name == "gemma3":
        image = hf.Gemma3ImageProcessor(size=square)
        names = {"boi_token": "<boi>", "eoi_token": "<eoi>", "image_token": "<soft>"}
        return hf.Gemma3Processor(
            image, tokenizer(**names), chat_template=TEMPLATES[name], image_seq_length=4
        )
    image = hf.Qwen2VLImageProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=1024
    )
    made = hf.Qwen2VLProcessor.__new__(hf.Qwen2VLProcessor)
    words = tokenizer(image_token="<|image_pad|>", video_token="<|video_pad|>")
    made.check_argument_for_proper_class = lambda name, argument: None
    hf.Qwen2VLProcessor.__init__(made, image, words, Frames(image), chat_template=TEMPLATES[name])
    return made


class Frames:
    """Makes videos of frames by the image processor; the real one needs torchvision."""

    merge_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, image: Any) -> None:
        self.image = image

    def __call__(self, videos: Any, **_: Any) -> dict[str, Any]:
        import torch

        parts, grids = [], []
        for frames in videos:
            found = [self.image(frame, return_tensors="pt") for frame in frames[::2]]
            parts += [one["pixel_values"] for one in found]
            grids.append([len(found), *found[0]["image_grid_thw"][0, 1:].tolist()])
        return {"pixel_values_videos": torch.cat(parts), "video_grid_thw": torch.tensor(grids)}


def picture(seed: int = 0, height: int = 16, width: int = 16) -> Any:
    """A small colour image."""
    from PIL import Image

    data = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(data)
