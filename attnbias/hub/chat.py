"""Messages with named parts, and the text that a template makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnbias.errors import AttnbiasError

_MARK = "\ue000{}\ue001"  # private-use characters: no text and no template contains them
MARKS = "\ue000(.*?)\ue001"

Part = tuple[str, str]  # name and text
Chat = list[tuple[str, list[Part]]]  # role and its parts
Places = dict[str, tuple[int, int]]  # name of a part -> its characters


def mark(name: object) -> str:
    """A piece of text that stands for something else."""
    return _MARK.format(name)


@dataclass(frozen=True)
class Layout:
    """A rendered prompt twice: with a mark in place of each part, and as it is.

    Attributes:
        skeleton: the text with marks. parts: mark -> name and text, in order. whole: the text.
    """

    skeleton: str
    parts: dict[str, Part]
    whole: str

    def filled(self, skeleton: str) -> tuple[str, Places]:
        """`skeleton` (this one, or what became of it) with the parts in place of their marks.

        A search for the texts themselves would find a short one inside the template's own words.
        """
        text, places, rest = "", {}, skeleton
        for sign, (name, content) in self.parts.items():
            before, found, rest = rest.partition(sign)
            if not found:
                raise AttnbiasError(f"the chat template leaves out or moves the part {name!r}.")
            text += before
            places[name] = (len(text), len(text) + len(content))
            text += content
        return text + rest, places


def named(
    messages: str | Sequence[Mapping[str, str]],
    documents: Sequence[str],
    system: str | None,
) -> Chat:
    """The messages with a name for each part; documents go before the question."""
    if isinstance(documents, str) or not all(isinstance(one, str) for one in documents):
        raise AttnbiasError("documents must be a list of texts.")
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    chat: Chat = [("system", [("system", system)])] if system is not None else []
    places = [number for number, one in enumerate(messages) if one.get("role") == "user"]
    others = 0
    for number, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str):
            raise AttnbiasError(
                'messages must be text or a list of {"role": text, "content": text}, got '
                f"{dict(message)!r} at place {number}."
            )
        if places and number == places[-1]:
            before = [(f"document {k}", text) for k, text in enumerate(documents)]
            chat.append((role, [*before, ("question", content)]))
        elif role == "system" and system is None:
            chat.append((role, [("system", content)]))
        else:
            chat.append((role, [(f"message {others}", content)]))
            others += 1
    if documents and not places:
        raise AttnbiasError("documents need a user message to stand before, got none.")
    # A name that appears twice would lose the first place.
    names = [name for _, parts in chat for name, _ in parts]
    if len(set(names)) < len(names):
        raise AttnbiasError("messages must hold at most one system message.")
    return chat


def joined(chat: Chat, separator: str, media: Sequence[str] = ()) -> Layout:
    """Without a template: everything joined by `separator`, `media` (placeholders) first."""
    parts: dict[str, Part] = {}
    for _, named_parts in chat:
        for part in named_parts:
            parts[mark(len(parts))] = part
    layout = Layout(separator.join([*media, *parts]), parts, "")
    return Layout(layout.skeleton, parts, layout.filled(layout.skeleton)[0])


def rendered(
    apply: Callable[..., Any],
    chat: Chat,
    separator: str,
    media: Sequence[str] = (),
    pieces: bool = False,
) -> Layout:
    """What the template makes of the messages, `media` ("image" or "video") before the question.

    The template is filled with marks, then the texts are put in their place. That the result is
    what it makes of the texts is checked, not assumed.

    Args:
        apply: ``apply_chat_template`` of a tokenizer or of a processor.
        pieces: whether the template takes contents as lists of pieces, as those of processors do.
    """
    parts: dict[str, Part] = {}
    marked: list[dict[str, Any]] = []
    real: list[dict[str, Any]] = []
    users = [number for number, (role, _) in enumerate(chat) if role == "user"]
    for number, (role, named_parts) in enumerate(chat):
        signs, texts = [], []
        for name, content in named_parts:
            signs.append(mark(len(parts)))
            texts.append(content.strip())
            parts[signs[-1]] = (name, texts[-1])
        before = media if users and number == users[-1] else ()
        for made, words in ((marked, signs), (real, texts)):
            content = _content(separator.join(words), before, pieces or bool(media))
            made.append({"role": role, "content": content})
    options = {"tokenize": False, "add_generation_prompt": chat[-1][0] != "assistant"}
    try:
        layout = Layout(str(apply(marked, **options)), parts, str(apply(real, **options)))
    except Exception as error:
        raise AttnbiasError(f"the chat template refused the messages: {error}") from error
    if layout.filled(layout.skeleton)[0] != layout.whole:
        raise AttnbiasError(
            "the chat template changes its text with the content, so its parts cannot be placed."
        )
    return layout


def _content(text: str, media: Sequence[str], pieces: bool) -> Any:
    """Plain text, or the list of pieces that templates of models with images take."""
    return [*({"type": kind} for kind in media), {"type": "text", "text": text}] if pieces else text
