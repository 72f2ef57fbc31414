"""Prompts with images and videos: where a processor puts their tokens."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnbias.errors import AttnbiasError
from attnbias.hub.chat import MARKS, Chat, Layout, Places, joined, mark, rendered


class _Recorder:
    """A tokenizer that keeps the text it was given last, and which characters each token covers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.text = ""
        self.offsets: list[tuple[int, int]] = []

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        out = self._tokenizer(text, *args, **{**options, "return_offsets_mapping": True})
        self.text = text if isinstance(text, str) else text[0]
        offsets = out.pop("offset_mapping")
        offsets = offsets if isinstance(text, str) else offsets[0]
        self.offsets = [(int(a), int(b)) for a, b in offsets]
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class Media:
    """Images and videos of one prompt, with the processor that makes tokens of them.

    Args:
        processor: a processor of transformers: a tokenizer with an image (or video) processor.
        images, videos: in the order of their places in the text; images may be paths of files.
    """

    def __init__(self, processor: Any, images: Sequence[Any], videos: Sequence[Any]) -> None:
        for kind, given in (("image", images), ("video", videos)):
            if given and getattr(processor, f"{kind}_processor", None) is None:
                raise AttnbiasError(
                    f"{kind}= needs the model's processor (AutoProcessor.from_pretrained) with its "
                    f"{kind} processor, got {type(processor).__name__}."
                )
        self.processor = processor
        self.images = [opened(one) for one in images]
        self.videos = list(videos)

    @property
    def kinds(self) -> list[str]:
        """ "image" and "video", once for each."""
        return ["image"] * len(self.images) + ["video"] * len(self.videos)

    def layout(self, chat: Chat, separator: str) -> tuple[Layout, bool]:
        """The text before its placeholders grow, and whether a template made it."""
        if not any(role == "user" for role, _ in chat):
            raise AttnbiasError("an image needs a user message to stand in, got none.")
        for owner in (self.processor, self.processor.tokenizer):
            if getattr(owner, "chat_template", None):
                return rendered(owner.apply_chat_template, chat, separator, self.kinds), True
        return joined(chat, separator, [self._names(kind)[0] for kind in self.kinds]), False

    def encode(
        self, layout: Layout, special: bool
    ) -> tuple[dict[str, Any], list[tuple[int, int]], str, Places]:
        """Model inputs, the characters of each token, the grown text and where its parts stand.

        The processor is run twice: once on the text with marks around each placeholder, which
        tells where its tokens come to stand, and once on the text itself.
        """
        _, grown = self._run(self._marked(layout), special)
        text, places = "", {}
        for number, piece in enumerate(re.split(MARKS, grown.text)):
            if number % 2 == 0:
                text += piece
            elif mark(piece) in layout.parts:
                name, content = layout.parts[mark(piece)]
                places[name] = (len(text), len(text) + len(content))
                text += content
            else:  # a placeholder begins, or it ends
                places[piece] = (places.get(piece, (len(text), 0))[0], len(text))
        inputs, found = self._run(layout.whole, special)
        if found.text != text:
            raise AttnbiasError(
                f"{type(self.processor).__name__} changes its text with the content, so the parts "
                "of the prompt cannot be placed."
            )
        return inputs, found.offsets, text, places

    def own(self, kind: str, ids: Sequence[int]) -> int | None:
        """The token that stands for images (or videos) in `ids`, None where none is known."""
        known: set[int] = set()
        tokenizer = self.processor.tokenizer
        for owner in (self.processor, tokenizer):
            number, name = (getattr(owner, f"{kind}_token{end}", None) for end in ("_id", ""))
            if number is None and isinstance(name, str):
                number = tokenizer.convert_tokens_to_ids(name)
            if isinstance(number, int):
                known.add(number)
        # Gemma's processor also calls the sign before an image by that name: it is there only once.
        return max(known & set(ids), key=list(ids).count, default=None)

    def _names(self, kind: str) -> list[str]:
        """What a text may write for an image: Gemma's has another sign than the tokens it gets."""
        owners = (self.processor, self.processor.tokenizer)
        names = (f"{kind}_token", "boi_token") if kind == "image" else (f"{kind}_token",)
        found = [getattr(owner, name, None) for name in names for owner in owners]
        return [name for name in dict.fromkeys(found) if isinstance(name, str)]

    def _marked(self, layout: Layout) -> str:
        """The skeleton with a mark on both sides of each placeholder."""
        text = layout.skeleton
        for kind in dict.fromkeys(self.kinds):
            names = self._names(kind)
            sign = next((name for name in names if name in text), None)
            count = self.kinds.count(kind)
            if sign is None or text.count(sign) != count:
                raise AttnbiasError(
                    f"the prompt must hold one placeholder for each {kind}, got "
                    f"{text.count(sign) if sign else 0} of {sign or ' or '.join(names) or 'none'!r}"
                    f" for {count}."
                )
            for name, content in layout.parts.values():
                if sign in content:
                    raise AttnbiasError(
                        f"the part {name!r} holds {sign!r}, the sign for an {kind}: leave it out "
                        f"of the text, {kind}= has a place of its own."
                    )
            before, *rest = text.split(sign)
            around = [
                mark(f"{kind} {k}") + sign + mark(f"{kind} {k}") + after
                for k, after in enumerate(rest)
            ]
            text = before + "".join(around)
        return text

    def _run(self, text: str, special: bool) -> tuple[dict[str, Any], _Recorder]:
        processor = copy.copy(self.processor)
        processor.tokenizer = recorder = _Recorder(self.processor.tokenizer)
        given = {"images": self.images, "videos": self.videos}
        try:
            inputs = processor(
                text=[text],
                **{name: value for name, value in given.items() if value},
                return_tensors="pt",
                add_special_tokens=special,
            )
        except AttnbiasError:
            raise
        except Exception as error:
            said = " ".join(str(error).split())
            raise AttnbiasError(
                f"{type(self.processor).__name__} refused the prompt: {said}"
            ) from error
        return dict(inputs), recorder


def opened(image: Any) -> Any:
    """An image as the processors take it: a path is opened, everything else is left alone."""
    if not isinstance(image, (str, Path)):
        return image
    try:
        from PIL import Image
    except ImportError as error:
        raise AttnbiasError("an image file needs pillow: write pip install pillow.") from error
    try:
        with Image.open(image) as found:
            return found.convert("RGB")
    except OSError as error:
        raise AttnbiasError(f"image must be a readable file, got {str(image)!r}.") from error
