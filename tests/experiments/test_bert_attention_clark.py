from __future__ import annotations

import random

import pytest

from attnbias.measures import AttentionProbe
from experiments import bert_attention_clark


@pytest.mark.usefixtures("minilm")
def test_the_probe_beats_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bert_attention_clark, "SENTENCES", 32)
    model, _ = bert_attention_clark._loaded()
    data, words, relations = bert_attention_clark.prepared(1)
    found = AttentionProbe(words, relations).measure(model, data)
    assert found.accuracy > found.baseline + 0.15


def test_a_parse_is_a_tree() -> None:
    for seed in range(20):
        words, related = bert_attention_clark.sentence(random.Random(seed))
        heads = {word: head for word, head, _ in related}
        assert len(heads) == len(related) == len(words) - 1
        for word in range(len(words)):
            seen = set()
            while word in heads:
                assert word not in seen
                seen.add(word)
                word = heads[word]
            assert words[word] in bert_attention_clark.VERBS
