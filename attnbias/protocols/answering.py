"""How a model answers one item, and the scores of the answer."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.protocols.base import Item

Answer = tuple[dict[str, float], str]


def picture(folder: Path, name: str) -> Any:
    """An image file as RGB.

    Raises:
        AttnbiasError: a file that is missing or no image.
    """
    from PIL import Image

    path = folder / name
    try:
        with Image.open(path) as found:
            return found.convert("RGB")
    except OSError as error:
        raise AttnbiasError(f"image {str(path)!r} cannot be read: {error}") from error


def written(model: Any, processor: Any, prompt: Any, item: Item, new_tokens: int) -> Answer:
    """`match`: whether a right answer stands in what is written greedily, after case, punctuation
    and articles are taken away.
    """
    text = write(model, processor, prompt, new_tokens)
    plain = _normal(text)
    hit = any(_normal(answer) and _normal(answer) in plain for answer in item["answers"])
    return {"match": float(hit)}, text


def described(model: Any, processor: Any, prompt: Any, item: Item, new_tokens: int) -> Answer:
    """`chair_s` (any object named that is not there), `chair_i` (their share of those named),
    `recall` (share of those there that are named).
    """
    text = write(model, processor, prompt, new_tokens)
    words = f" {_normal(text)} "

    def named(synonyms: str) -> bool:
        found = (_normal(one) for one in synonyms.split("|"))
        return any(one and re.search(rf"\b{re.escape(one)}(s|es)?\b", words) for one in found)

    there = {one for one in item["objects"] if named(one)}
    wrong = {one for one in item["vocabulary"] if one not in item["objects"] and named(one)}
    total = len(there) + len(wrong)
    scores = {
        "chair_s": float(bool(wrong)),
        "chair_i": len(wrong) / total if total else 0.0,
        "recall": len(there) / len(item["objects"]),
    }
    return scores, text


def chosen(model: Any, processor: Any, prompt: Any, item: Item, new_tokens: int) -> Answer:
    """`accuracy`: whether the right choice is the likeliest; `margin`: its log-probability less
    that of the best other (nats). Choices are read token by token, as a model writes them.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    found = [
        log_probability(model, prompt, continuation(tokenizer, choice))
        for choice in item["choices"]
    ]
    right = found[item["answer"]]
    others = [value for n, value in enumerate(found) if n != item["answer"]]
    best = max(range(len(found)), key=found.__getitem__)
    # Some rules hide tokens: what is hidden is never right, and has no margin.
    scores = {"accuracy": float(best == item["answer"] and math.isfinite(right))}
    if others and math.isfinite(right) and math.isfinite(max(others)):
        scores["margin"] = right - max(others)
    return scores, str(item["choices"][best])


def predicted(model: Any, processor: Any, prompt: Any, item: Item, new_tokens: int) -> Answer:
    """`log_probability`: mean over the tokens of the text after the first (nats)."""
    ids = prompt.inputs["input_ids"].to(model.device)
    if ids.shape[1] < 2:
        raise AttnbiasError("a text must have two tokens at least")
    logs = model(**on_device(model, prompt)).logits[:, :-1].float().log_softmax(-1)
    found = logs.gather(-1, ids[:, 1:, None]).mean()
    return {"log_probability": float(found)}, ""


def classified(model: Any, processor: Any, prompt: Any, item: Item, new_tokens: int) -> Answer:
    """`accuracy` where the item has a label and the model has classes."""
    out = model(**on_device(model, prompt))
    logits = getattr(out, "logits", None)
    if logits is None:
        return {}, ""
    best = int(logits[0].argmax())
    scores = {"accuracy": float(best == item["label"])} if "label" in item else {}
    return scores, str(best)


# The model's work ---------------------------------------------------------------------------------


def on_device(model: Any, prompt: Any) -> dict[str, Tensor]:
    """The inputs where the model is; decoders do not take the token types some tokenizers give."""
    inputs = {name: value.to(model.device) for name, value in prompt.inputs.items()}
    if "pixel_values" not in inputs:
        inputs.pop("token_type_ids", None)
    elif inputs["pixel_values"].is_floating_point() and model.dtype.is_floating_point:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def written_ids(model: Any, prompt: Any, new_tokens: int) -> list[int]:
    """The tokens that the model writes after a prompt, greedily."""
    inputs = on_device(model, prompt)
    length = inputs["input_ids"].shape[1]
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False}
    if model.generation_config.pad_token_id is None:
        ends = model.generation_config.eos_token_id
        options["pad_token_id"] = ends[0] if isinstance(ends, list) else (ends or 0)
    ids: list[int] = model.generate(**inputs, **options)[0, length:].tolist()
    return ids


def write(model: Any, processor: Any, prompt: Any, new_tokens: int) -> str:
    """The same as text."""
    tokenizer = getattr(processor, "tokenizer", processor)
    ids = written_ids(model, prompt, new_tokens)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def continuation(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text that goes on from another.

    Tokenizers differ in what they make of a space at the start of a text, so it is read after a
    letter; where letter and text melt into one token, by itself.
    """
    before: list[int] = tokenizer("x", add_special_tokens=False)["input_ids"]
    ids: Sequence[int] = tokenizer("x" + text, add_special_tokens=False)["input_ids"]
    if list(ids[: len(before)]) == before and len(ids) > len(before):
        ids = ids[len(before) :]
    else:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise AttnbiasError(f"the choice {text!r} has no token")
    return list(ids)


def log_probability(model: Any, prompt: Any, ids: Sequence[int]) -> float:
    """Sum of the log-probabilities of tokens after a prompt, one forward with a cache for each, so
    that every rule acts as it does when the model writes.
    """
    out = model(**on_device(model, prompt), use_cache=len(ids) > 1)
    total = 0.0
    for number, token in enumerate(ids):
        total += float(out.logits[0, -1].float().log_softmax(-1)[token])
        if number + 1 < len(ids):
            step = torch.tensor([[token]], device=model.device)
            out = model(input_ids=step, past_key_values=out.past_key_values, use_cache=True)
    return total


def _normal(text: str) -> str:
    """As answers are compared since SQuAD: lower case, no punctuation, no articles, one space."""
    bare = "".join(" " if c in string.punctuation else c for c in text.lower())
    return " ".join(word for word in bare.split() if word not in ("a", "an", "the"))
