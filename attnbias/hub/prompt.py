"""Model inputs whose parts have names: first, system, image, document 0, question, generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.hub.chat import joined, named, rendered
from attnbias.hub.images import Media

Span = tuple[int, int | None]


@dataclass(frozen=True)
class Prompt:
    """Inputs of a model with named spans of token positions.

    Attributes:
        inputs: keyword arguments of the model, one row: ``input_ids (1, length)`` and so on.
        spans: name to ``(start, stop)``, half open, counted from the first token. "generated" has
            stop None: it begins where the prompt ends and grows.
        tokens: the tokens as text, one per position.
        text: the text that was tokenized, with the template around it.
    """

    inputs: dict[str, Tensor]
    spans: dict[str, Span]
    tokens: list[str]
    text: str


def prompt(
    tokenizer: Any,
    messages: str | Sequence[Mapping[str, str]],
    *,
    documents: Sequence[str] = (),
    system: str | None = None,
    image: Any = None,
    images: Sequence[Any] = (),
    video: Any = None,
    separator: str = "\n\n",
    max_length: int | None = None,
) -> Prompt:
    """Build model inputs and the spans of their parts.

    A tokenizer with a chat template puts its template around the parts; another joins images,
    system, documents and question by `separator`. Where the parts lie is known from the characters
    that each token covers, so what the template adds belongs to no part.

    Args:
        tokenizer: a fast tokenizer, or a processor that holds one. Images and videos need the
            model's processor.
        messages: the question as text, or messages ``{"role": ..., "content": ...}``; the last user
            message is then the question, a system message is "system", the others are "message 0",
            "message 1" and so on.
        documents: texts put before the question, in order: "document 0", "document 1".
        system: the instruction before everything: "system".
        image: one image, put before documents and question: a file's path, or what the processor
            takes (a PIL image, an array, a tensor).
        images: several; "image 0", "image 1" and so on are each one's own tokens, "image" goes from
            the first token of the first to the last of the last, signs between images included.
        video: one video as the processor takes it, such as a list of frames: "video".
        separator: what stands between documents and question.
        max_length: the longest prompt allowed, in tokens; by default what the tokenizer allows.

    Returns:
        `Prompt`; its spans also hold "first" (position 0) and "generated".

    Cost: with images the processor runs twice, as only it knows how many tokens an image becomes.

    Raises:
        AttnbiasError: a slow tokenizer, an empty prompt, a prompt that is too long, a template that
            drops or changes a part, images for something that has no image processor.
    """
    processor, tokenizer = tokenizer, getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise AttnbiasError(
            f"tokenizer must be a fast tokenizer (it tells which characters a token covers), got "
            f"{type(tokenizer).__name__}."
        )
    chat = named(messages, documents, system)
    media = Media(processor, _pictures(image, images), [] if video is None else [video])
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    if media.kinds:
        layout, templated = media.layout(chat, separator)
        special = not (templated and _begun(tokenizer, layout.whole))
        inputs, offsets, text, places = media.encode(layout, special)
    else:
        # A processor's own template writes for the model that it belongs to, images or none.
        pieces = processor is not tokenizer and bool(getattr(processor, "chat_template", None))
        writer = processor if pieces else tokenizer
        template = getattr(writer, "chat_template", None)
        layout = (
            rendered(writer.apply_chat_template, chat, separator, pieces=pieces)
            if template
            else joined(chat, separator)
        )
        text, places = layout.filled(layout.skeleton)
        inputs = tokenizer(
            text,
            return_offsets_mapping=True,
            return_tensors="pt",
            add_special_tokens=not _begun(tokenizer, text) if pieces else not template,
            verbose=False,
        )
        offsets = inputs.pop("offset_mapping")[0].tolist()
    if not offsets:
        raise AttnbiasError("messages must hold some text, got an empty prompt.")
    if limit is not None and len(offsets) > limit:
        raise AttnbiasError(f"the prompt has {len(offsets)} tokens, more than the {limit} allowed.")
    ids = inputs["input_ids"][0].tolist()
    spans: dict[str, Span] = {"first": (0, 1)}
    for name, (start, stop) in places.items():
        covered = [
            number for number, (a, b) in enumerate(offsets) if a < b and a < stop and b > start
        ]
        kind = name.split()[0]
        if kind in media.kinds:
            own = media.own(kind, [ids[number] for number in covered])
            covered = [number for number in covered if own in (None, ids[number])]
        if covered:
            spans[name] = (covered[0], covered[-1] + 1)
    for kind in dict.fromkeys(media.kinds):
        each = [spans[f"{kind} {number}"] for number in range(media.kinds.count(kind))]
        spans[kind] = (each[0][0], each[-1][1])
    spans["generated"] = (len(offsets), None)
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return Prompt(dict(inputs), spans, [str(token) for token in tokens], text)


def _begun(tokenizer: Any, text: str) -> bool:
    """Whether a processor's template has written the first token itself: no second one then."""
    bos = getattr(tokenizer, "bos_token", None)
    return bool(bos and text.startswith(bos))


def _pictures(image: Any, images: Sequence[Any]) -> list[Any]:
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise AttnbiasError("images must be a list of images; write image= for one.")
    if image is not None and images:
        raise AttnbiasError("give either image= or images=, got both.")
    return list(images) if image is None else [image]
