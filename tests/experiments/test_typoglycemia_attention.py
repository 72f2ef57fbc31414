from __future__ import annotations

import pytest

from experiments import typoglycemia_attention


@pytest.mark.usefixtures("shared", "minilm")
def test_more_letters_scrambled_less_of_the_word() -> None:
    found = typoglycemia_attention.measure(0, count=4)
    assert found["similarity at ratio 0.25"] > found["similarity at ratio 1.0"]
    assert found["effect"] > 0
