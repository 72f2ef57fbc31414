"""Files are written whole or not at all, and say what the report says."""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import replace

import pytest

from attnbias import AttnbiasError
from attnbias.report import Map
from attnbias.report.files import check_targets, to_csv, to_json, write_all
from tests.report.made import even_data, even_map, planted, sink_data

KIND = ("first_token", "First", "share of attention", 0.1)


def test_writes_all(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    write_all({tmp_path / "a": b"new", tmp_path / "b": b"2"})
    assert (tmp_path / "a").read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_failure_leaves_everything_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdopen", fails)
    with pytest.raises(AttnbiasError, match="No space left"):
        write_all({tmp_path / "a": b"new", tmp_path / "b": b"2"})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kind", ["missing folder", "folder", "twice"])
def test_bad_targets_are_refused_before_any_work(tmp_path, kind):
    paths = {
        "missing folder": [tmp_path / "no" / "a"],
        "folder": [tmp_path],
        "twice": [tmp_path / "a", tmp_path / "." / "a"],
    }[kind]
    with pytest.raises(AttnbiasError):
        check_targets(paths)
    assert os.listdir(tmp_path) == []


def test_csv_has_a_row_for_each_head():
    data = sink_data()
    rows = list(csv.DictReader(io.StringIO(to_csv(data).decode())))
    assert len(rows) == 3 * 72
    sink = [r for r in rows if (r["statistic"], r["layer"], r["head"]) == ("first_token", "1", "3")]
    assert [(float(r["value"]), float(r["shuffled"])) for r in sink] == [(0.66, 0.62)]


def test_json_is_the_report_with_null_for_what_is_missing():
    first, *rest = sink_data().maps
    holes = replace(first, values=planted(first.values, {(0, 0): float("nan")}))
    data = json.loads(to_json(replace(sink_data(), maps=(holes, *rest))))
    assert data["maps"][0]["values"][0][0] is None
    assert data["maps"][0]["values"][1][3] == 0.66
    assert data["text_sha256"] == sink_data().text_hash


def test_maps_must_fit_their_layers():
    good = even_map(KIND)
    for change in ({"shuffled": good.shuffled[:-1]}, {"layers": (0,)}, {"even": (0.1,)}):
        with pytest.raises(AttnbiasError):
            replace(good, **change)
    with pytest.raises(AttnbiasError, match="maps"):
        even_data(maps=())
    assert isinstance(good, Map)
