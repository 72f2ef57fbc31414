"""Texts as words: joined from tokens by their place in the text, shuffled as wholes."""

from __future__ import annotations

import pytest
import torch

from attnbias import AttnbiasError
from attnbias.hub.modes import limit
from attnbias.report.text import read, shuffled

TEXT = "  Unbelievably, the\n\nnaïve café-owner  said: 東京 😀!"


@pytest.fixture(scope="module")
def tokenizer(minilm):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def decoder_tokenizer(stories):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(stories)


@pytest.mark.parametrize("which", ["tokenizer", "decoder_tokenizer"])
def test_words_are_those_of_the_text_and_cover_all_tokens(which, request):
    found = read(TEXT, request.getfixturevalue(which), 512)
    words = [w.text for w in found.words if not w.special and w.text.strip("⏎␣")]
    assert words == TEXT.split()
    places = [place for w in found.words for place in range(w.start, w.stop)]
    assert places == list(range(len(found.ids)))
    assert any(w.stop - w.start > 1 for w in found.words)


def test_spaces_after_words_are_kept(tokenizer):
    found = read(TEXT, tokenizer, 512)
    shown = "".join(w.text + w.gap for w in found.words if not w.special)
    assert shown == TEXT.strip()


def test_special_tokens_are_told_apart(tokenizer):
    words = read("[CLS] is text, <s> too", tokenizer, 512).words
    assert words[0].special
    assert words[0].text == "[CLS]"
    assert words[-1].special
    assert not any(w.special for w in words[2:-1])


def test_shuffling_moves_words_as_wholes(tokenizer):
    found = read(TEXT + " and more words to move", tokenizer, 512)
    order = shuffled(found.words, seed=3)
    assert sorted(order) == list(range(len(found.ids)))
    assert list(order) != sorted(order)
    assert order == shuffled(found.words, seed=3)
    assert order != shuffled(found.words, seed=4)
    assert order[0] == 0
    assert order[-1] == len(order) - 1
    for word in found.words:
        where = [order.index(place) for place in range(word.start, word.stop)]
        assert where == list(range(where[0], where[0] + len(where)))


def test_too_long_is_refused_and_cut_when_asked(tokenizer):
    long = "word and another " * 300
    with pytest.raises(AttnbiasError, match=r"902 tokens.*accepts 512.*--max-tokens 512"):
        read(long, tokenizer, 512)
    found = read(long, tokenizer, 512, max_tokens=100)
    assert len(found.ids) == 100
    assert found.words[-1].special
    assert found.text == " ".join(long.split()[:98])
    for wrong in (2, 513):
        with pytest.raises(AttnbiasError, match="max_tokens"):
            read(long, tokenizer, 512, max_tokens=wrong)


@pytest.mark.parametrize("text", ["", "   ", "hi"])
def test_a_text_of_no_words_is_refused(tokenizer, text):
    with pytest.raises(AttnbiasError, match="fewer than two tokens"):
        read(text, tokenizer, 512)


def test_limit_is_the_smaller_that_is_known(tokenizer):
    from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer_limit = tokenizer.model_max_length
    for positions, wanted in ((64, 64), (9999, tokenizer_limit)):
        model = BertModel(BertConfig(max_position_embeddings=positions, **small))
        assert limit(model, tokenizer) == wanted < 9999
    # Positions count on from the padding index: 66 rows hold 64 tokens, and no more.
    model = RobertaModel(RobertaConfig(max_position_embeddings=66, pad_token_id=1, **small))
    assert limit(model, tokenizer) == 64
    model(torch.full((1, 64), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(torch.full((1, 65), 5))
