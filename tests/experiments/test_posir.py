from __future__ import annotations

import random
from pathlib import Path

import pytest

from experiments import posir


@pytest.mark.usefixtures("shared", "minilm")
def test_evidence_at_the_beginning_is_found_more_often() -> None:
    plain, shuffled = posir.curves(0, "facts", rotations=2, count=20)
    assert plain.slope.value < shuffled.slope.value
    assert float(plain.values[0]) > plain.score.value
    assert int(plain.counts.sum()) == 40


def test_the_span_is_the_evidence(shared: Path) -> None:
    given = posir.facts(random.Random(1), 0, 20)
    for query, text, (start, stop) in zip(given.queries, given.documents, given.spans, strict=True):
        role = query.split()[3]
        assert text[start:stop].startswith(f"The {role} keeps the")
    assert given.relative.min() < 0.05
    assert given.relative.max() > 0.95
