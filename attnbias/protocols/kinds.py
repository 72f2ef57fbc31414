"""Kinds of data: how an item becomes a prompt, and how a model's answer to it is scored."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnbias.errors import AttnbiasError
from attnbias.protocols import answering
from attnbias.protocols.base import Item

Scores = dict[str, float]


@dataclass(frozen=True)
class Kind:
    """One kind of data.

    Args:
        fields: of a line of the file, as `items.read` takes them. example: a line.
        says: what a line holds, in words.
        ask: ``(processor, item, folder, random) -> Prompt``.
        score: ``(model, processor, prompt, item, new_tokens) -> (scores, text)``.
        loads: which models answer it: "text", "image-text" or "vision".
    """

    fields: Mapping[str, str]
    example: str
    says: str
    ask: Callable[[Any, Item, Path, random.Random], Any]
    score: Callable[[Any, Any, Any, Item, int], tuple[Scores, str]]
    loads: str
    check: Callable[[Item], str] = lambda item: ""


def _ask_text(processor: Any, item: Item, folder: Path, draw: random.Random) -> Any:
    """A question after its documents. A gold document has the span "gold"; another, drawn, "other".

    Texts under "marks" become spans of their names.
    """
    import attnbias as ab

    question = item["question"] if "question" in item else item["text"]
    documents = item.get("documents", [])
    prompt = ab.prompt(processor, question, documents=documents, system=item.get("system"))
    spans: dict[str, Any] = dict(prompt.spans)
    gold = item.get("gold")
    if gold is not None:
        rest = [number for number in range(len(documents)) if number != gold]
        spans["gold"] = spans[f"document {gold}"]
        if rest:
            spans["other"] = spans[f"document {draw.choice(rest)}"]
    for name, words in item.get("marks", {}).items():
        spans[name] = _place(processor, prompt.text, words, name)
    return replace(prompt, spans=spans)


def _place(tokenizer: Any, text: str, words: str, name: str) -> tuple[int, int]:
    """The tokens that cover some words of a prompt, where they stand last."""
    start = text.rfind(words)
    if start < 0:
        raise AttnbiasError(f"the mark {name!r} is {words!r}, which the prompt does not hold")
    special = not getattr(tokenizer, "chat_template", None)
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=special, verbose=False)
    stop = start + len(words)
    covered = [
        number
        for number, (a, b) in enumerate(found["offset_mapping"])
        if a < b and a < stop and b > start
    ]
    return covered[0], covered[-1] + 1


def _ask_image(processor: Any, item: Item, folder: Path, draw: random.Random) -> Any:
    import attnbias as ab

    make: Any = ab.prompt
    picture = answering.picture(folder, item["image"])
    question = item.get("question", "Please describe this image in detail.")
    documents = item.get("documents", [])
    return make(processor, question, documents=documents, image=picture)


def _ask_pixels(processor: Any, item: Item, folder: Path, draw: random.Random) -> Any:
    from attnbias.hub.prompt import Prompt

    found = processor(images=answering.picture(folder, item["image"]), return_tensors="pt")
    return Prompt(dict(found.items()), {}, [], "")


def _check_documents(item: Item) -> str:
    gold, documents = item.get("gold"), item.get("documents", [])
    if gold is not None and gold >= len(documents):
        return f"'gold' is {gold}, but there are {len(documents)} documents"
    marks = item.get("marks", {})
    if not isinstance(marks, dict) or not all(isinstance(v, str) and v for v in marks.values()):
        return f"'marks' must be an object of texts by name, got {marks!r:.60}"
    return ""


def _check_choices(item: Item) -> str:
    if item["answer"] >= len(item["choices"]):
        return f"'answer' is {item['answer']}, but there are {len(item['choices'])} choices"
    return _check_documents(item)


_DOCUMENTS = {"documents": "texts?", "gold": "number?", "system": "text?"}

KINDS: dict[str, Kind] = {
    "answers": Kind(
        fields={"question": "text", "answers": "texts", **_DOCUMENTS},
        example=(
            '{"question": "Who ...?", "documents": ["...", "..."], "gold": 1, "answers": ["..."]}'
        ),
        says="a question, its documents, the number of the one with the answer, right answers",
        ask=_ask_text,
        score=answering.written,
        loads="text",
        check=_check_documents,
    ),
    "choices": Kind(
        fields={"question": "text", "choices": "texts", "answer": "number", **_DOCUMENTS},
        example='{"question": "... The colour is", "choices": [" red", " blue"], "answer": 0}',
        says="a question, what could follow it word for word, the number of what should",
        ask=_ask_text,
        score=answering.chosen,
        loads="text",
        check=_check_choices,
    ),
    "texts": Kind(
        fields={"text": "text"},
        example='{"text": "..."}',
        says="a text",
        ask=_ask_text,
        score=answering.predicted,
        loads="text",
    ),
    "captions": Kind(
        fields={"image": "path", "objects": "texts", "vocabulary": "texts", "question": "text?"},
        example=(
            '{"image": "1.jpg", "objects": ["dog|puppy"], "vocabulary": ["dog|puppy", "cat"]}'
        ),
        says="an image, the objects in it and all that are looked for, synonyms between bars",
        ask=_ask_image,
        score=answering.described,
        loads="image-text",
    ),
    "image choices": Kind(
        fields={"image": "path", "question": "text", "choices": "texts", "answer": "number",
                "documents": "texts?"},
        example=(
            '{"image": "1.jpg", "question": "A dog?", "choices": ["Yes", "No"], "answer": 0}'
        ),
        says="an image, a question, what could be answered, the number of what should",
        ask=_ask_image,
        score=answering.chosen,
        loads="image-text",
        check=_check_choices,
    ),
    "images": Kind(
        fields={"image": "path", "label": "number?"},
        example='{"image": "1.jpg", "label": 3}',
        says="an image, and the number of its class if there is one",
        ask=_ask_pixels,
        score=answering.classified,
        loads="vision",
    ),
}  # fmt: skip
