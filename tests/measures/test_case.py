"""The case of measures, and what all of them share: scores, their ranking, errors and files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.measures import HeadMeasure, Measure, Scores
from attnbias.measures.base import Data, bar, evaluating, forwards
from attnbias.measures.scores import gather
from tests.cases.measure import Maps, MeasureCase
from tests.steer.models import Subject


@dataclass(frozen=True)
class First(HeadMeasure):
    """Mean attention to the first token: as small as a measure can be."""

    name: ClassVar[str] = "first"

    def measure(
        self, model: nn.Module, data: Data | None = None, *, progress: bool = False
    ) -> Scores:
        given, parts, layers, tower = forwards(data, "First"), [], [], ""
        with evaluating(model), torch.no_grad(), bar(len(given), "first token", progress) as tick:
            for inputs in given:
                with ab.observe(model, [ab.statistics.FirstToken()]) as seen:
                    model(**inputs)
                towers = {site.tower for site in seen.sites}
                tower = "text" if "text" in towers else towers.pop()
                found = seen.tensor("first_token", tower)
                layers = found.labels["layer"]
                parts.append(found.values[0].nanmean(-1).movedim(1, 0))  # (batch, layers, heads)
                tick()
        return Scores(self.name, tower, tuple(layers), gather(parts))


class TestFirst(MeasureCase):
    def build(self, subject: Subject) -> Measure:
        return First()

    def dense(self, subject: Subject, maps: Maps) -> Tensor:
        (layers,) = maps.values()
        real = subject.inputs.get("attention_mask")
        found = []
        for row in range(len(layers[0])):
            keep = slice(None) if real is None else real[row].bool()
            found.append(torch.stack([p[row][:, keep][..., keep][..., 0].mean(-1) for p in layers]))
        return torch.stack(found)


def scores(**more: Any) -> Scores:
    samples = torch.tensor([[[0.1, 0.5], [0.9, 0.2]], [[0.3, 0.5], [0.7, torch.nan]]])
    return Scores("thing", "text", (0, 3), samples.double(), **more)


def test_ranking_errors_and_controls() -> None:
    one = scores()
    assert one.ranked() == [(3, 0), (0, 1), (0, 0), (3, 1)]
    assert one.top(2) == ((3, 0), (0, 1))
    assert one.above(0.4) == ((3, 0), (0, 1))
    assert one.of(0, 0) == pytest.approx(0.2)
    assert float(one.error[0, 0]) == pytest.approx(0.1)
    assert float(one.error[0, 1]) == 0.0
    assert one.error[1, 1].isnan()
    rest = one.others(one.top(2))
    assert set(rest) == {(0, 0), (3, 1)}
    assert ab.rules.BlockHeads(heads=one.top(2)).heads == ((3, 0), (0, 1))
    with pytest.raises(AttnbiasError, match="3 are asked"):
        one.others(one.top(3))
    with pytest.raises(AttnbiasError, match="1 to 4"):
        one.top(5)
    with pytest.raises(AttnbiasError, match="no layer 1"):
        one.of(1, 0)
    assert "layer 3, head 0" in str(one)


def test_tables_and_files(tmp_path: Path) -> None:
    table = scores().table()
    assert next(tuple(row)[:4] for row in table) == ("text", 0, 0, "thing")
    scores().save(tmp_path / "scores.csv")
    assert (tmp_path / "scores.csv").read_text().splitlines()[0].startswith("tower,layer,head")


def test_parts_of_different_width_are_padded() -> None:
    found = gather([torch.ones(1, 2, 3), torch.zeros(2, 2, 2)])
    assert found.shape == (3, 2, 3)
    assert found[1:, :, 2].isnan().all()
