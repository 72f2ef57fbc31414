"""Gradients of the attention itself, taken of an eager float64 model's maps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attnbias.errors import AttnbiasError
from attnbias.measures import AttentionGradient, Measure
from tests.cases.measure import Maps, MeasureCase
from tests.measures.test_head_importance import padded, pooled
from tests.steer import models
from tests.steer.models import Subject


class TestAttentionGradient(MeasureCase):
    subjects: ClassVar[tuple[str, ...]] = ("minilm", "stories", "llava")
    tolerance = 5e-5

    def data(self, subject: Subject) -> list[Mapping[str, Any]]:
        return [padded(subject, "right" if subject.name == "minilm" else "left")]

    def tokens(self, subject: Subject) -> tuple[int, ...] | None:
        ids = subject.inputs["input_ids"]
        return (int(ids[0, 4]), int(ids[0, 7]), int(ids[1, 6]))

    def build(self, subject: Subject) -> Measure:
        return AttentionGradient(tokens=self.tokens(subject), loss=pooled)

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        twin: Any = copy.deepcopy(subject.model).double()
        twin.set_attn_implementation("eager")
        (inputs,), found = self.data(subject), []
        for row in range(2):
            one = subject.row(row, **inputs)
            if "attention_mask" in one:
                real = one.pop("attention_mask")[0].bool()
                one = {name: value[:, real] for name, value in one.items()}
            one = {n: v.double() if v.is_floating_point() else v for n, v in one.items()}
            out = twin(**one, output_attentions=True)
            slopes = torch.autograd.grad(pooled(out, one).sum(), out.attentions, allow_unused=True)
            ids, wanted = one["input_ids"][0].tolist(), self.tokens(subject)
            aims = [n for n, i in enumerate(ids) if wanted is None or i in wanted]
            layers = []
            for slope in slopes:
                assert slope is not None
                total = torch.zeros(slope.shape[1], dtype=torch.float64)
                for i in range(len(ids)):
                    for j in aims:
                        if not subject.causal or j <= i:
                            total += slope[0, :, i, j].abs() / len(ids)
                layers.append(total)
            found.append(torch.stack(layers))
        return torch.stack(found)


class TestEveryToken(TestAttentionGradient):
    def tokens(self, subject: Subject) -> tuple[int, ...] | None:
        return None


def test_it_needs_tokens(request: pytest.FixtureRequest) -> None:
    subject = models.make("vit", request)
    with pytest.raises(AttnbiasError, match="input_ids"):
        AttentionGradient(loss=pooled).measure(subject.model, [subject.inputs])
