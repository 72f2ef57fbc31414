"""Spans: each names exactly the tokens of its part."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from attnbias import AttnbiasError
from attnbias.hub import prompt

CHAT = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)
DOCUMENTS = ["Lily has a red ball.", "Tom likes the sun, and the moon."]
QUESTION = "What does Tom like?"


def _tokenizer(path: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def _text(tokenizer: Any, made: Any, name: str) -> str:
    start, stop = made.spans[name]
    ids = made.inputs["input_ids"][0, start:stop]
    return "".join(str(tokenizer.decode(ids)).split())


def _plain(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("template", [None, CHAT])
def test_parts_of_a_decoder_prompt(stories: Any, template: str | None) -> None:
    tokenizer = _tokenizer(stories)
    tokenizer.chat_template = template
    made = prompt(tokenizer, QUESTION, documents=DOCUMENTS, system="Be a good friend.")
    length = made.inputs["input_ids"].shape[1]
    assert made.inputs["input_ids"].shape == made.inputs["attention_mask"].shape
    assert made.spans["first"] == (0, 1)
    assert made.spans["generated"] == (length, None)
    assert len(made.tokens) == length
    assert _text(tokenizer, made, "question") == _plain(QUESTION)
    assert _text(tokenizer, made, "document 0") == _plain(DOCUMENTS[0])
    assert _text(tokenizer, made, "document 1") == _plain(DOCUMENTS[1])
    assert _text(tokenizer, made, "system") == _plain("Be a good friend.")
    assert ("<assistant>" in made.text) == (template is not None)
    order = [made.spans[n] for n in ("system", "document 0", "document 1", "question")]
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(order))


def test_encoder_prompt(minilm: Any) -> None:
    tokenizer = _tokenizer(minilm)
    made = prompt(tokenizer, QUESTION, documents=DOCUMENTS)
    assert made.tokens[0] == "[CLS]"
    assert made.tokens[-1] == "[SEP]"
    assert made.spans["document 0"][0] == 1
    assert made.spans["question"][1] == len(made.tokens) - 1
    assert _text(tokenizer, made, "document 1") == _plain(DOCUMENTS[1].lower())
    assert set(made.inputs) >= {"input_ids", "attention_mask", "token_type_ids"}


def test_a_short_part_is_not_looked_for_in_the_template(stories: Any) -> None:
    tokenizer = _tokenizer(stories)
    tokenizer.chat_template = CHAT
    made = prompt(tokenizer, "user", system="s")  # both words occur in the template itself
    start, stop = made.spans["question"]
    assert made.text.startswith("<system> s\n<user> user\n")
    assert "".join(made.tokens[start:stop]).strip("▁ ") == "user"
    system = made.spans["system"]
    assert system[1] <= start


def test_messages(stories: Any) -> None:
    tokenizer = _tokenizer(stories)
    tokenizer.chat_template = CHAT
    made = prompt(
        tokenizer,
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello there"},
            {"role": "assistant", "content": "Hi!"},
            {"role": "user", "content": QUESTION},
        ],
        documents=DOCUMENTS[:1],
    )
    assert _text(tokenizer, made, "system") == "Bekind."
    assert _text(tokenizer, made, "message 0") == "Hellothere"
    assert _text(tokenizer, made, "message 1") == "Hi!"
    assert _text(tokenizer, made, "question") == _plain(QUESTION)


def test_the_template_gets_what_it_would_have_got(stories: Any) -> None:
    tokenizer = _tokenizer(stories)
    tokenizer.chat_template = CHAT
    made = prompt(tokenizer, QUESTION, system="Be kind.")
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": QUESTION},
    ]
    wanted = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert made.inputs["input_ids"].tolist() == wanted["input_ids"].tolist()


def test_refusals(stories: Any) -> None:
    tokenizer = _tokenizer(stories)
    with pytest.raises(AttnbiasError, match="fast tokenizer"):
        prompt(object(), QUESTION)
    with pytest.raises(AttnbiasError, match="a list of texts"):
        prompt(tokenizer, QUESTION, documents="one text")
    with pytest.raises(AttnbiasError, match=r"got .*at place 0"):
        prompt(tokenizer, [{"role": "user"}])
    with pytest.raises(AttnbiasError, match="user message to stand before"):
        prompt(tokenizer, [{"role": "system", "content": "x"}], documents=DOCUMENTS)
    with pytest.raises(AttnbiasError, match="tokens, more than the 5 allowed"):
        prompt(tokenizer, QUESTION, max_length=5)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(AttnbiasError, match="leaves out or moves the part 'question'"):
        prompt(tokenizer, QUESTION)
    tokenizer.chat_template = "{{ messages[0]['content'] }}{{ messages[0]['content'] | length }}"
    with pytest.raises(AttnbiasError, match="changes its text with the content"):
        prompt(tokenizer, QUESTION)
    tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    with pytest.raises(AttnbiasError, match="refused the messages: no system here"):
        prompt(tokenizer, QUESTION)
