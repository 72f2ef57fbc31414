"""PreplanAnchor beside loops over the eager maps of prompt and response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.measures import Measure, PreplanAnchor, Rhythm
from tests.cases.measure import Maps, MeasureCase
from tests.cases.statistic import close
from tests.steer import models
from tests.steer.models import Subject

WINDOW, LOW, HIGH, START = 3, 2, 5, 4


class TestPreplanAnchor(MeasureCase):
    subjects = ("stories", "mistral", "llava")
    padding: str | None = None

    def build(self, subject: Subject) -> Measure:
        return PreplanAnchor(window=WINDOW, low=LOW, high=HIGH)

    def values(self, result: Any) -> Tensor:
        parts = [torch.stack([one.waad, one.fai]) for one in result]
        size = max(part.shape[1] for part in parts)
        pads = [torch.nn.functional.pad(p, (0, size - p.shape[1]), value=-1) for p in parts]
        return torch.stack(pads)

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        given = dict(subject.inputs)
        mask = torch.ones_like(given["input_ids"])
        if self.padding:
            mask[1, slice(None, 3) if self.padding == "left" else slice(-3, None)] = 0
        return [{**given, "attention_mask": mask, "response": [START, START + 1]}]

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        plain = {w: v for w, v in given.items() if w != "response"}
        return [
            {**{w: v[n : n + 1] for w, v in plain.items()}, "response": START + n} for n in range(2)
        ]

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (given,) = self.data(subject)
        twin: Any = subject.eager().double()
        found = []
        for row in range(2):
            keep = given["attention_mask"][row].bool()
            own = {"input_ids": given["input_ids"][row : row + 1, keep]}
            if "pixel_values" in given:
                own["pixel_values"] = given["pixel_values"][row : row + 1].double()
            with torch.no_grad():
                every = twin(**own, output_attentions=True).attentions
            layers = {3: (1, 2), 5: (2, 3)}[len(every)]
            window = getattr(twin.config, "sliding_window", None)
            found.append(rhythm([every[n][0].double() for n in layers], START + row, window))
        size = max(len(part[0]) for part in found)
        return torch.tensor(
            [[line + [-1.0] * (size - len(line)) for line in part] for part in found]
        )


def rhythm(layers: list[Tensor], start: int, window: int | None) -> tuple[list[float], list[float]]:
    heads = [p.tolist() for layer in layers for p in layer]
    length = len(heads[0])
    spans = []
    for p in heads:
        rows = [sum(p[t][s] * (t - s) for s in range(t + 1)) for t in range(start, length)]
        spans.append(sum(rows) / len(rows))
    order = sorted(range(len(heads)), key=lambda h: spans[h])
    size = max(1, round(0.3 * len(heads)))
    local, far = ([heads[h] for h in part] for part in (order[:size], order[-size:]))
    waad, fai = [], []
    for t in range(start, length):
        each = [sum(p[t][s] * min(t - s, WINDOW) for s in range(t + 1)) for p in local]
        waad.append(sum(each) / size)
    for s in range(start, length):
        later = [
            t for t in range(s + LOW, min(length, s + HIGH + 1)) if not window or t - s < window
        ]
        each = [sum(p[t][s] for t in later) / len(later) if later else float("nan") for p in far]
        fai.append(sum(each) / size)
    return waad, fai


class TestPreplanAnchorLeftPadded(TestPreplanAnchor):
    subjects = ("stories",)
    padding = "left"


class TestPreplanAnchorRightPadded(TestPreplanAnchor):
    subjects = ("mistral",)
    padding = "right"


def test_layers_are_spread_over_the_middle() -> None:
    assert PreplanAnchor().middle(36) == (12, 15, 18, 21, 24)
    assert PreplanAnchor().middle(12) == (4, 5, 6, 7, 8)
    assert PreplanAnchor().middle(5) == (2, 3)
    assert PreplanAnchor().middle(1) == (0,)
    assert PreplanAnchor(layers=(0, 3)).middle(12) == (0, 3)


NAN = float("nan")


def one(waad: list[float], fai: list[float]) -> Rhythm:
    return Rhythm(torch.tensor(waad).double(), torch.tensor(fai).double(), ((0, 0),), ((0, 1),))


def test_credit_by_hand() -> None:
    """Steps 3, 3, 0, 0, 2, 2, 0 (median 2); median WAAD 1; the two anchors are tokens 2 and 6."""
    found = one([1, 4, 1, 1, 1, 3, 1, 1], [0.1, 0.2, 0.9, 0.1, 0.3, 0.2, 0.8, NAN])
    close(found.steps, torch.tensor([3, 3, 0, 0, 2, 2, 0, NAN]))
    assert found.preplan(0.3).tolist() == [True, True] + [False] * 6
    assert found.anchors(0.3).nonzero()[:, 0].tolist() == [2, 6]
    dominated, source = found.dominated(0.3, back=2)
    assert dominated.nonzero()[:, 0].tolist() == [2, 6]
    assert source[dominated].tolist() == [0, 4]
    close(found.factors("preplan", share=0.3), torch.tensor([1.5, 1.5, 1, 1, 1, 1, 1, 1]))
    close(found.factors("anchor", share=0.3), torch.tensor([1, 1, 1.5, 1, 1, 1, 1.5, 1]))
    want = torch.tensor([1.2, 1, 1.3, 1, 1.2, 1, 1.3, 1])
    close(found.factors(share=0.3, moved=0.4, back=2), want)
    close(found.factors(share=0.3, moved=0), found.factors("anchor", share=0.3))
    total = found.factors(share=0.3, moved=1, back=2).sum()
    close(total, found.factors("anchor", share=0.3).sum())
    advantages = torch.tensor([1.0, 1, 1, 1, -1, -1, -1, -1])
    close(
        found.scaled(advantages, "anchor", share=0.3), torch.tensor([1, 1, 1.5, 1, -1, -1, -1, -1])
    )
    # An anchor in the middle of a plan (high WAAD), or after nothing of note, is a plain one.
    plain = one([4, 1, 4, 1, 1, 1, 1, 1], [0.1, 0.1, 0.9, 0.1, 0.1, 0.1, 0.8, NAN])
    dominated, _ = plain.dominated(0.3, back=1)
    assert dominated.nonzero()[:, 0].tolist() == [6]
    with pytest.raises(AttnbiasError, match="advantages"):
        found.scaled(torch.ones(3))
    for bad, word in (
        ({"credit": "x"}, "credit"),
        ({"moved": 2}, "moved"),
        ({"share": 0}, "share"),
    ):
        with pytest.raises(AttnbiasError, match=word):
            found.factors(**bad)  # type: ignore[arg-type]


def test_a_planted_anchor_ranks_first() -> None:
    """A token whose key agrees with every query is the one of the largest influence."""
    subject = models.mistral()
    with torch.no_grad():
        for layer in subject.model.model.layers:  # type: ignore[union-attr]
            layer.self_attn.q_proj.weight.mul_(0.01)
            layer.self_attn.k_proj.weight.mul_(0.01)
    table = subject.model.get_input_embeddings()  # type: ignore[operator]
    with torch.no_grad():
        for layer in subject.model.model.layers:  # type: ignore[union-attr]
            # All queries are alike, and only the token 50 answers to them (slow pairs alone).
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.k_proj.weight.zero_()
            layer.self_attn.q_proj.weight[3::8, 0] = 3.0
            layer.self_attn.k_proj.weight[3::8, 0] = 3.0
        table.weight[:, 0] = 1.0
        table.weight[50, 0] = 30.0
    ids = models.tokens(1, 20) % 40 + 3
    ids[0, 9] = 50
    data = [{"input_ids": ids, "response": 4}]
    (found,) = PreplanAnchor(low=1, high=4, layers=(0,)).measure(subject.model, data)
    assert int(found.fai.nan_to_num(0).argmax()) == 9 - 4
    assert found.anchors(0.1)[5]


def test_bad_input() -> None:
    subject = models.mistral()
    for bad, word in (
        ({}, "response"),
        ({"response": 12}, "two"),
        ({"response": [1]}, "as many"),
    ):
        with pytest.raises(AttnbiasError, match=word):
            PreplanAnchor().measure(subject.model, [{**subject.inputs, **bad}])
    for bad, word in (({"depth": 0}, "depth"), ({"group": 0.7}, "group"), ({"low": -1}, "low")):
        with pytest.raises(AttnbiasError, match=word):
            PreplanAnchor(**bad)  # type: ignore[arg-type]
