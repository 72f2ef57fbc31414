"""`attnbias-models field`: trains, resumes, predicts and draws; refuses bad tables."""

from __future__ import annotations

import argparse
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from attnbias.errors import AttnbiasError
from attnbias_models import store, training
from attnbias_models.fields import command, table
from attnbias_models.fields import map as maps
from attnbias_models.training import Interrupted

SMALL: list[str | Path] = [
    "--steps",
    "4",
    "--blocks",
    "1",
    "--batch",
    "2",
    "--most",
    "30",
    "--quiet",
]


def run(*words: str | Path) -> int:
    """A command line of this family alone."""
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    return command.run(parser.parse_args([str(word) for word in words]))


def written(path: Path, rows: int = 50, **columns: Sequence[Any]) -> Path:
    draw = np.random.default_rng(0)
    x, y = draw.uniform(0, 9, rows), draw.uniform(10, 30, rows)
    known: dict[str, Any] = {"east": x, "north": y, "depth": draw.uniform(0, 1, rows)}
    known["day"] = pd.date_range("2024-03-01", periods=rows, freq="6h").strftime("%Y-%m-%dT%H:%M")
    known["ph"] = 6 + np.sin(x) + np.cos(y / 4)
    pd.DataFrame({**known, **columns}).to_csv(path, index=False)
    return path


def size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    wide, high = struct.unpack(">II", head[16:])
    return wide, high


def test_trains_and_predicts_on_a_grid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = written(tmp_path / "soil.csv"), tmp_path / "model"
    place = ("--space", "east", "north", "--target", "ph")
    assert run("field", "train", "--data", data, *place, "--out", out, *SMALL) == 0
    shown = capsys.readouterr().out
    assert "rows kept apart" in shown
    assert "best step" in shown
    found, picture = tmp_path / "grid.csv", tmp_path / "grid.png"
    made = ("--out", found, "--map", picture, "--chunk", "7")
    assert run("field", "predict", out, "--data", data, "--grid", "5", *made) == 0
    grid = pd.read_csv(found)
    assert list(grid.columns) == ["east", "north", "mean", "std"]
    assert len(grid) == 25
    known = pd.read_csv(data)
    assert grid["east"].min() == pytest.approx(known["east"].min())
    assert grid["north"].max() == pytest.approx(known["north"].max())
    assert (grid["std"] > 0).all()
    assert abs(grid["mean"].mean() - known["ph"].mean()) < 3 * known["ph"].std()
    assert size(picture)[0] > 500
    # At the places of a file: the same numbers.
    again = tmp_path / "again.csv"
    at = tmp_path / "at.csv"
    grid[["north", "east"]].to_csv(at, index=False)
    assert run("field", "predict", out, "--data", data, "--at", at, "--out", again) == 0
    assert np.allclose(pd.read_csv(again)[["mean", "std"]], grid[["mean", "std"]], atol=1e-5)


def test_dates_effects_and_a_resumed_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(tmp_path / "river.csv")
    words: list[str | Path] = [
        "--space",
        "east",
        "--time",
        "day",
        "--effects",
        "depth",
        "--target",
        "ph",
        *SMALL,
    ]
    real = training.train
    with monkeypatch.context() as patch:
        patch.setattr(
            "attnbias_models.fields.estimator.train",
            lambda *args, **given: real(*args, **given, stop_after=2),
        )
        with pytest.raises(Interrupted):
            run("field", "train", "--data", data, "--out", tmp_path / "one", *words)
    for name in ("one", "two"):
        run("field", "train", "--data", data, "--out", tmp_path / name, *words)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert first == second
    model, extra = store.load(tmp_path / "one")
    assert (model.config.space, model.config.time, model.config.effects) == (1, True, 1)
    assert extra["columns"]["time"] == "day"
    found = tmp_path / "out.csv"
    run("field", "predict", tmp_path / "one", "--data", data, "--at", data, "--out", found)
    days = pd.read_csv(found)["day"]
    assert days[1] - days[0] == pytest.approx(0.25)
    with pytest.raises(AttnbiasError, match="a grid has no fixed effects"):
        run("field", "predict", tmp_path / "one", "--data", data, "--grid", "4", "--out", found)


def test_space_and_time_on_a_grid_at_a_moment(tmp_path: Path) -> None:
    data, out = written(tmp_path / "a.csv"), tmp_path / "model"
    words: list[str | Path] = [
        "--space",
        "east",
        "north",
        "--time",
        "day",
        "--target",
        "ph",
        "--out",
        out,
        *SMALL,
    ]
    run("field", "train", "--data", data, *words)
    found, picture = tmp_path / "grid.csv", tmp_path / "map.png"
    ask: list[str | Path] = ["field", "predict", out, "--data", data, "--grid", "3", "--out", found]
    with pytest.raises(AttnbiasError, match="needs --when, a value of 'day'"):
        run(*ask)
    with pytest.raises(AttnbiasError, match="ISO 8601 date, got 'soon'"):
        run(*ask, "--when", "soon")
    assert not found.exists()
    run(*ask, "--when", "2024-03-05", "--map", picture)
    assert set(pd.read_csv(found)["day"]) == {19787.0}  # days since 1970
    assert size(picture)[1] > 200


def test_a_model_of_a_process_is_used_on_a_table(tmp_path: Path) -> None:
    out = tmp_path / "gp"
    run("field", "train", "--process", "gp1d", "--out", out, *SMALL)
    data, found = written(tmp_path / "a.csv", 12), tmp_path / "line.csv"
    ask: list[str | Path] = ["field", "predict", out, "--data", data, "--grid", "9", "--out", found]
    with pytest.raises(AttnbiasError, match="trained on no table"):
        run(*ask)
    run(*ask, "--space", "east", "--target", "ph", "--map", tmp_path / "line.png")
    assert len(pd.read_csv(found)) == 9
    assert size(tmp_path / "line.png")[0] > 500
    with pytest.raises(AttnbiasError, match="takes 1 coordinates, 0 time and 0 effects, got 2"):
        run(*ask, "--space", "east", "north", "--target", "ph")


@pytest.mark.parametrize("process", ["sphere", "epidemics"])
def test_other_processes(process: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--steps", "1", "--blocks", "1", "--batch", "1", "--quiet"]
    assert run("field", "train", "--process", process, "--out", tmp_path / "out", *words) == 0
    assert process in capsys.readouterr().out
    with pytest.raises(AttnbiasError, match="leave out --target"):
        run("field", "train", "--process", process, "--target", "y", "--out", tmp_path, *words)


BAD: list[tuple[dict[str, Any], list[str], str]] = [
    ({"east": [1.0] * 6 + [""] + [2.0] * 43}, [], "row 7, column 'east': a value is missing"),
    ({"north": [1.0] * 49 + ["nan"]}, [], "row 50, column 'north': a value is missing"),
    ({"ph": ["acid"] * 50}, [], "column 'ph': expected a finite number, got 'acid'"),
    ({"east": ["inf"] * 50}, [], "expected a finite number, got 'inf'"),
    ({"day": ["monday"] * 50}, ["--time", "day"], "ISO 8601 date, got 'monday'"),
    ({}, ["--effects", "clay"], "must have one column 'clay', its columns are east, north"),
    ({}, ["--effects", "north"], "column 'north' is named twice"),
    ({"north": [100.0] * 50}, ["--sphere"], "latitude is within 90 degrees"),
]


@pytest.mark.parametrize(("columns", "words", "match"), BAD, ids=[match for *_, match in BAD])
def test_bad_tables_are_refused(
    columns: dict[str, Any], words: list[str], match: str, tmp_path: Path
) -> None:
    data, out = written(tmp_path / "a.csv", **columns), tmp_path / "out"
    order: list[str | Path] = ["--space", "north", "east", "--target", "ph", *words, *SMALL]
    with pytest.raises(AttnbiasError, match=match):
        run("field", "train", "--data", data, "--out", out, *order)
    assert not out.exists()


def test_few_rows_no_file_no_target(tmp_path: Path) -> None:
    out = tmp_path / "out"
    place: list[str | Path] = ["--space", "east", "--target", "ph", "--out", out, *SMALL]
    with pytest.raises(AttnbiasError, match="at least 20 rows, got 8"):
        run("field", "train", "--data", written(tmp_path / "a.csv", 8), *place)
    with pytest.raises(AttnbiasError, match="cannot be read as a CSV file"):
        run("field", "train", "--data", tmp_path / "none.csv", *place)
    with pytest.raises(AttnbiasError, match="needs --target"):
        run("field", "train", "--data", tmp_path / "a.csv", "--space", "east", "--out", out)
    with pytest.raises(AttnbiasError, match="columns of space or a column of time"):
        run("field", "train", "--data", tmp_path / "a.csv", "--target", "ph", "--out", out)
    (tmp_path / "twice.csv").write_text("east,east,ph\n1,2,3\n", encoding="utf-8")
    with pytest.raises(AttnbiasError, match="must have one column 'east'"):
        table.read(tmp_path / "twice.csv", ["east", "ph"])
    with pytest.raises(AttnbiasError, match="does not exist"):
        run("field", "predict", out, "--data", "a.csv", "--grid", "3", "--out", out / "b.csv")
    assert not out.exists()


def test_maps_refuse_and_lines_are_sorted(tmp_path: Path) -> None:
    with pytest.raises(AttnbiasError, match="one or two coordinates"):
        maps.draw(tmp_path / "a.png", np.zeros((4, 3)), np.zeros(4), np.ones(4))
    with pytest.raises(AttnbiasError, match="at least 2 places"):
        maps.grid(np.zeros(2), np.ones(2), 1)
    grid = maps.grid(np.array([0.0, 5.0]), np.array([1.0, 6.0]), 3)
    assert grid.shape == (9, 2)
    assert grid[1].tolist() == [0.0, 5.5]
    maps.draw(tmp_path / "b.png", grid[::2], np.zeros(5), np.ones(5), sphere=True)
    assert size(tmp_path / "b.png")[0] > 500
