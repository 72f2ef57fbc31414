"""Tables and files: written whole or not at all, readable, and added to by other packages."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.errors import AttnbiasError
from attnbias.observe import Row, Seen, Table
from tests.cases.statistic import TARGETS, every
from tests.observe import models

s = ab.statistics


@pytest.fixture
def seen(stories: Path) -> Seen:
    model = models.stories_model(stories)
    names = {'a, "b"\n<script>': (0, 3), "=1+1": [(2, None)], "middle": (5, 9)}
    with torch.no_grad(), ab.observe(model, every(), spans=names, targets=TARGETS) as found:
        model(input_ids=models.tokens(1, 20, 500))
    return found


def test_csv_holds_every_number(seen: Seen, tmp_path: Path) -> None:
    seen.save(tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["tower", "layer", "head", "statistic", "value"]
    table = seen.table()
    assert len(rows) == len(table) + 1
    for line, row in zip(rows[1:], table, strict=True):
        assert line[:4] == [row.tower, str(row.layer), str(row.head), row.statistic]
        assert float(line[4]) == row.value
    assert 'share[a, "b"\n<script>]' in {r.statistic for r in table}


def test_json_has_the_documented_schema(seen: Seen, tmp_path: Path) -> None:
    seen.save(str(tmp_path / "out.json"))
    payload = json.loads((tmp_path / "out.json").read_text())
    assert payload["schema"] == "attnbias.observe/1"
    assert set(payload) == {"schema", "statistics", "spans", "runs", "columns", "rows"}
    assert [Row(*row) for row in payload["rows"]] == list(seen.table())
    assert payload["spans"]["=1+1"] == [[2, None]]
    assert payload["runs"][0][1] == {
        "tower": "text",
        "layer": 1,
        "module": "model.layers.1.self_attn",
        "batch": 1,
        "heads": 8,
        "tokens": 20,
    }
    assert payload["statistics"][1] == {
        "label": "received[queries]",
        "name": "received",
        "parameters": {"denominator": "queries"},
    }


def test_nothing_to_average_is_empty_and_null() -> None:
    table = Table([Row("text", 0, 1, "entropy", math.nan)])
    assert table.to_csv().splitlines()[1] == "text,0,1,entropy,"
    assert json.loads(table.to_json())["rows"] == [["text", 0, 1, "entropy", None]]
    assert str(table).splitlines()[1].split() == ["text", "0", "entropy", "-"]


@pytest.mark.parametrize("name", ["out.txt", "out", "out.csv.gz", ".csv"])
def test_other_kinds_of_file_are_refused(seen: Seen, tmp_path: Path, name: str) -> None:
    with pytest.raises(AttnbiasError, match=r"saved as \.csv or \.json"):
        seen.save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_is_refused(seen: Seen, tmp_path: Path) -> None:
    with pytest.raises(AttnbiasError, match=r"cannot write .*: the folder .* does not exist"):
        seen.save(tmp_path / "no" / "out.csv")
    (tmp_path / "dir.csv").mkdir()
    with pytest.raises(AttnbiasError, match="it is a folder"):
        seen.save(tmp_path / "dir.csv")


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file(
    seen: Seen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = tmp_path / "out.json"
    target.write_text("before")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        seen.save(target)
    assert target.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_the_text_is_one_line_for_each_layer_and_statistic(seen: Seen) -> None:
    table = seen.table().where(statistic="entropy")
    lines = str(table).splitlines()
    assert lines[0].split()[:3] == ["tower", "layer", "statistic"]
    assert len(lines) == 6
    assert float(lines[3].split()[3]) == pytest.approx(table.where(layer=2)[0].value, rel=1e-3)
    assert str(seen) == str(seen.table())
    assert str(Table()) == "tower  layer  statistic"
    with pytest.raises(AttnbiasError, match="columns tower, layer, head, statistic, value, got x"):
        table.where(x=1)


def test_pandas_view(seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = seen.table().to_pandas()
    assert list(frame.columns) == ["tower", "layer", "head", "statistic", "value"]
    assert len(frame) == len(seen.table())
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(AttnbiasError, match="pip install pandas"):
        seen.table().to_pandas()


# Statistics of other packages ---------------------------------------------------------------------

PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar
from attnbias.statistics import Statistic

@dataclass(frozen=True)
class Tallest(Statistic):
    """The sum of the squares of a row."""
    name: ClassVar[str] = "tallest"
    def tile(self, tile):
        return tile.probabilities.square().sum(-1)

class Thief(Tallest):
    name = "entropy"
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package laid out as pip would."""
    code = PLUGIN.replace("from attnbias.statistics", "from attnbias.observe.statistics")
    (tmp_path / "tiny_statistics.py").write_text(code)
    info = tmp_path / "tiny_statistics-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-statistics\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[attnbias.statistics]\ntallest = tiny_statistics:Tallest\nthief = tiny_statistics:Thief\n"
        "gone = tiny_statistics:Gone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("tiny_statistics", None)


def test_another_package_adds_a_statistic(plugin: None, stories: Path) -> None:
    assert "tallest" in s.available()
    assert "tiny_statistics" not in sys.modules
    model = models.stories_model(stories)
    with torch.no_grad(), ab.observe(model, ["tallest", "entropy"]) as seen:
        out = model(input_ids=models.tokens(1, 20, 500))
    assert out.logits.shape[1] == 20
    peak = seen.tensor("tallest").values
    assert float(peak.max()) <= 1 + 1e-6
    assert float(peak.min()) >= 1 / 20
    assert {r.statistic for r in seen.table()} == {"tallest", "entropy"}


def test_a_bad_addition_is_named(plugin: None) -> None:
    with pytest.raises(AttnbiasError, match=r"'thief'.*must set `name` to a word other than"):
        s.by_name("thief")
    with pytest.raises(AttnbiasError, match="'gone'"):
        s.by_name("gone")
    with pytest.raises(AttnbiasError, match=r"no statistic is called 'x'.*share, .*gone, tallest"):
        s.by_name("x")
