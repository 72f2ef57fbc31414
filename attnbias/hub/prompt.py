"""Model inputs whose parts have names: first, system, document 0, question, generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from attnbias.errors import AttnbiasError

Span = tuple[int, int | None]
_MARK = "\ue000{}\ue001"  # private-use characters: no text and no template contains them


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
    separator: str = "\n\n",
    max_length: int | None = None,
) -> Prompt:
    """Build model inputs and the spans of their parts.

    A tokenizer with a chat template puts its template around the parts; another joins system,
    documents and question by `separator`. Where the parts lie is known from the characters that
    each token covers, so what the template adds belongs to no part.

    Args:
        tokenizer: a fast tokenizer, or a processor that holds one.
        messages: the question as text, or messages ``{"role": ..., "content": ...}``; the last user
            message is then the question, a system message is "system", the others are "message 0",
            "message 1" and so on.
        documents: texts put before the question, in order: "document 0", "document 1".
        system: the instruction before everything: "system".
        separator: what stands between documents and question.
        max_length: the longest prompt allowed, in tokens; by default what the tokenizer allows.

    Returns:
        `Prompt`; its spans also hold "first" (position 0) and "generated".

    Raises:
        AttnbiasError: a slow tokenizer, an empty prompt, a prompt that is too long, a template that
            drops or changes a part.
    """
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise AttnbiasError(
            f"tokenizer must be a fast tokenizer (it tells which characters a token covers), got "
            f"{type(tokenizer).__name__}."
        )
    chat = _messages(messages, documents, system)
    template = getattr(tokenizer, "chat_template", None)
    if template:
        text, places = _rendered(tokenizer, chat, separator)
    else:
        text, places = _joined(chat, separator)
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        return_tensors="pt",
        add_special_tokens=not template,
        verbose=False,
    )
    offsets = encoded.pop("offset_mapping")[0].tolist()
    limit = max_length if max_length is not None else getattr(tokenizer, "model_max_length", None)
    if not offsets:
        raise AttnbiasError("messages must hold some text, got an empty prompt.")
    if limit is not None and len(offsets) > limit:
        raise AttnbiasError(f"the prompt has {len(offsets)} tokens, more than the {limit} allowed.")
    spans: dict[str, Span] = {"first": (0, 1)}
    for name, (start, stop) in places.items():
        covered = [
            number for number, (a, b) in enumerate(offsets) if a < b and a < stop and b > start
        ]
        if covered:
            spans[name] = (covered[0], covered[-1] + 1)
    spans["generated"] = (len(offsets), None)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"][0].tolist())
    return Prompt(dict(encoded), spans, [str(token) for token in tokens], text)


Part = tuple[str, str]  # name and text
Chat = list[tuple[str, list[Part]]]  # role and its parts


def _messages(
    messages: str | Sequence[Mapping[str, str]],
    documents: Sequence[str],
    system: str | None,
) -> Chat:
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
            named = [(f"document {k}", text) for k, text in enumerate(documents)]
            chat.append((role, [*named, ("question", content)]))
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


def _joined(chat: Chat, separator: str) -> tuple[str, dict[str, tuple[int, int]]]:
    text, places = "", {}
    for _, parts in chat:
        for name, content in parts:
            text += separator if text else ""
            places[name] = (len(text), len(text) + len(content))
            text += content
    return text, places


def _rendered(tokenizer: Any, chat: Chat, separator: str) -> tuple[str, dict[str, tuple[int, int]]]:
    """The template with marks in place of the texts, then the texts in place of the marks.

    A search for the texts themselves would find a short one inside the template's own words. That
    the result is what the template makes of the texts is checked, not assumed.
    """
    skeleton_chat, real_chat = [], []
    contents: dict[str, Part] = {}
    for role, parts in chat:
        marks = []
        for name, content in parts:
            mark = _MARK.format(len(contents))
            contents[mark] = (name, content.strip())
            marks.append(mark)
        skeleton_chat.append({"role": role, "content": separator.join(marks)})
        real_chat.append(
            {"role": role, "content": separator.join(content.strip() for _, content in parts)}
        )
    options = {"tokenize": False, "add_generation_prompt": chat[-1][0] != "assistant"}
    try:
        skeleton = tokenizer.apply_chat_template(skeleton_chat, **options)
        whole = tokenizer.apply_chat_template(real_chat, **options)
    except Exception as error:
        raise AttnbiasError(f"the chat template refused the messages: {error}") from error
    text, places, rest = "", {}, skeleton
    for mark, (name, content) in contents.items():
        before, found, rest = rest.partition(mark)
        if not found:
            raise AttnbiasError(f"the chat template leaves out or moves the part {name!r}.")
        text += before
        places[name] = (len(text), len(text) + len(content))
        text += content
    text += rest
    if text != whole:
        raise AttnbiasError(
            "the chat template changes its text with the content, so its parts cannot be placed."
        )
    return text, places
