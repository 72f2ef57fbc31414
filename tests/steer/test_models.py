"""The subjects of the rules' case attend sharply enough for an edit to show."""

from __future__ import annotations

import pytest
import torch

from tests.steer.models import NAMES, make

MAPS = {
    "bart encoder": "encoder_attentions",
    "bart decoder": "decoder_attentions",
    "bart cross": "cross_attentions",
}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_quarter_of_the_heads_attends_narrowly(name: str, request) -> None:
    """Mean entropy under half of what the keys in sight allow."""
    subject = make(name, request)
    found = subject.eager()(**subject.inputs, output_attentions=True)
    maps = torch.stack(getattr(found, MAPS.get(name, "attentions")))
    entropy = torch.special.entr(maps).sum(-1)
    most = (maps > 0).sum(-1).float().log()
    wide = most > 0  # a query that sees one key has nothing to choose
    share = (entropy * wide).sum((1, 3)) / (most * wide).sum((1, 3))
    assert (share < 0.5).float().mean() >= 0.25
