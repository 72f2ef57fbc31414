"""AttentionInfluence beside a float64 twin whose maps are made uniform by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias.measures import AttentionInfluence, Measure, Scores
from attnbias.measures.attention_influence import Influence
from tests.cases.measure import Maps, MeasureCase
from tests.steer import models
from tests.steer.models import Subject

HEADS = ((0, 1), (0, 2), (1, 0))


class TestAttentionInfluence(MeasureCase):
    """Queries of the masked heads set to zero by hooks on the projections of a float64 twin."""

    subjects = ("stories", "mistral", "llava")
    padding: str | None = "right"
    mode: ClassVar[Any] = "uniform"

    def build(self, subject: Subject) -> Measure:
        return AttentionInfluence(HEADS, mode=self.mode)

    def values(self, result: Any) -> Tensor:
        return torch.stack([result.plain, result.masked, result.values])

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        given = dict(subject.inputs)
        mask = torch.ones_like(given["input_ids"])
        if subject.name != "llava":
            part = slice(None, 4) if self.padding == "left" else slice(-4, None)
            mask[1, part] = 0
        return [{**given, "attention_mask": mask}]

    def rows(self, subject: Subject, given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [{w: v[n : n + 1] for w, v in given.items()} for n in range(2)]

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        twin: Any = subject.eager().double()
        (given,) = self.data(subject)
        plain = self.losses(twin, given)
        text = getattr(twin.model, "language_model", twin.model)
        for number, layer in enumerate(text.layers):
            heads = [head for at, head in HEADS if at == number]
            width = layer.self_attn.head_dim
            take_out(layer.self_attn, heads, width, self.mode)
        masked = self.losses(twin, given)
        return torch.stack([plain, masked, masked / plain - 1])

    @staticmethod
    def losses(twin: Any, given: Mapping[str, Any]) -> Tensor:
        found = []
        for row in range(2):
            keep = given["attention_mask"][row].bool()
            own = {"input_ids": given["input_ids"][row : row + 1, keep]}
            if "pixel_values" in given:
                own["pixel_values"] = given["pixel_values"][row : row + 1].double()
            with torch.no_grad():
                chances = twin(**own).logits[0].softmax(-1)
            ids = own["input_ids"][0].tolist()
            each = [-chances[n, token].log() for n, token in enumerate(ids[1:])]
            found.append(torch.stack(each).mean())
        return torch.stack(found)


def take_out(attention: Any, heads: list[int], width: int, mode: str) -> None:
    """Zero queries, or zero outputs, of some heads, in plain PyTorch."""

    def zeroed(x: Tensor) -> Tensor:
        x = x.clone()
        for head in heads:
            x[..., head * width : (head + 1) * width] = 0
        return x

    if mode == "uniform":
        attention.q_proj.register_forward_hook(lambda module, args, out: zeroed(out))
    else:
        attention.o_proj.register_forward_pre_hook(lambda module, args: (zeroed(args[0]),))


class TestAttentionInfluenceOfSilencedHeads(TestAttentionInfluence):
    subjects = ("stories",)
    padding = "left"
    mode = "zero"


def test_masking_changes_the_loss(request: pytest.FixtureRequest) -> None:
    case = TestAttentionInfluence()
    for name in case.subjects:
        found = case.measured(models.make(name, request))
        assert float(found.values.abs().max()) > 1e-3


def test_the_best_of_each_domain_are_selected() -> None:
    plain = torch.ones(7).double()
    masked = torch.tensor([1.1, 1.9, 1.2, 1.3, torch.nan, 1.05, 1.01]).double()
    found = Influence(plain, masked, HEADS)
    assert found.select(0.2).tolist() == [1]
    assert found.select(0.5, ["a", "a", "a", "a", "b", "b", "b"]).tolist() == [1, 3, 5, 6]
    with pytest.raises(AttnbiasError, match="domains"):
        found.select(0.5, ["a"])
    with pytest.raises(AttnbiasError, match="share"):
        found.select(0)


def test_five_percent_of_the_heads() -> None:
    samples = torch.rand(3, 4, 10, generator=torch.Generator().manual_seed(0)).double()
    scores = Scores("retrieval", "text", (0, 1, 2, 3), samples)
    assert AttentionInfluence.of(scores).heads == scores.top(2)
    assert AttentionInfluence.of(scores, 0.001).heads == scores.top(1)
    with pytest.raises(AttnbiasError, match="heads"):
        AttentionInfluence(())
    with pytest.raises(AttnbiasError, match="pairs"):
        AttentionInfluence((1, 2))  # type: ignore[arg-type]
    with pytest.raises(AttnbiasError, match="mode"):
        AttentionInfluence(HEADS, mode="half")  # type: ignore[arg-type]


def test_texts_of_one_token_say_nothing() -> None:
    model: nn.Module = models.mistral().model
    found = AttentionInfluence(HEADS).measure(model, [{"input_ids": torch.tensor([[5]])}])
    assert found.values.isnan().all()
