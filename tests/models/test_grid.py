"""Grids of experiments: cells are run once, searches are alike, verdicts follow from the cells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments.grid import Claim, Grid, bounds, interval

CALLS: list[tuple[str, float, int]] = []


def measure(variant: str, setting: Mapping[str, Any], seed: int) -> Mapping[str, float]:
    CALLS.append((variant, setting["rate"], seed))
    level = {"good": 1.0, "plain": 2.0}[variant] + 0.01 * seed
    return {"validation": abs(setting["rate"] - 2.0), "error": level + setting["rate"]}


def reduced(seed: int) -> Mapping[str, float]:
    return {"error": 1.0 + 0.01 * seed}


GRID = Grid(
    name="toy",
    work="none",
    question="?",
    data="none",
    variants=("good", "plain"),
    measure=measure,
    claims=(
        Claim("good is better", "error", "good", "plain"),
        Claim("plain is better", "error", "plain", "good"),
        Claim("better by much", "error", "good", "plain", margin=2.0),
    ),
    search=({"rate": 1.0}, {"rate": 2.5}, {"rate": 4.0}),
    reduced=reduced,
)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    CALLS.clear()


def test_every_variant_is_searched_alike_and_cells_are_run_once(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    result = GRID.run(path=path)
    # Three settings of two variants, then two more seeds of each at what was taken.
    assert len(CALLS) == 3 * 2 + 2 * 2
    assert {(v, s) for v, rate, s in CALLS if rate != 2.5} == {("good", 0), ("plain", 0)}
    assert result["complete"]
    assert [claim["holds"] for claim in result["claims"]] == [True, False, False]
    assert result["passed"] is False  # not every claim holds
    assert result["means"]["good"]["setting"] == {"rate": 2.5}
    assert json.loads(path.read_text())["claims"] == json.loads(json.dumps(result["claims"]))
    GRID.run(path=path)
    assert len(CALLS) == 10


def test_a_setting_may_be_searched_over_several_seeds(tmp_path: Path) -> None:
    def luck(variant: str, setting: Mapping[str, Any], seed: int) -> Mapping[str, float]:
        CALLS.append((variant, setting["rate"], seed))
        good_for_one = setting["rate"] == 1.0 and seed == 0
        return {"validation": 0.0 if good_for_one else setting["rate"], "error": 1.0}

    grid = dataclasses.replace(GRID, measure=luck, reduced=None, search=GRID.search[:2])
    assert grid.run(path=tmp_path / "one.json")["means"]["good"]["setting"] == {"rate": 1.0}
    far = tuple({"rate": rate} for rate in (1.0, 0.3))
    both = dataclasses.replace(grid, search=far, tried=3)
    CALLS.clear()
    found = both.run(path=tmp_path / "three.json")
    assert found["means"]["good"]["setting"] == {"rate": 0.3}
    assert len(CALLS) == 2 * 2 * 3  # every cell of the search is also a cell of the result


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "toy.json"
    GRID.run(path=path)
    whole = json.loads(path.read_text())
    cut = {**whole, "cells": whole["cells"][:4], "reduced": {"rows": whole["reduced"]["rows"][:2]}}
    path.write_text(json.dumps(cut))
    CALLS.clear()
    result = GRID.run(path=path)
    assert len(CALLS) == 6
    assert result["complete"]
    assert len(result["reduced"]["rows"]) == len(GRID.reduced_seeds)


def test_without_time_nothing_is_run_and_nothing_holds(tmp_path: Path) -> None:
    result = GRID.run(minutes=0, path=tmp_path / "toy.json")
    assert not CALLS
    assert not result["complete"]
    assert not any(claim["holds"] for claim in result["claims"])


@pytest.mark.parametrize(
    ("gains", "holds"),
    [
        ((0.9, 1.0, 1.1), True),
        ((0.1, 1.0, 2.0), False),  # every seed gains, and the interval still holds 0
        ((-0.1, 0.1, -0.1), False),
    ],
)
def test_a_claim_holds_where_its_interval_is_beyond_the_margin(
    gains: tuple[float, ...], holds: bool, tmp_path: Path
) -> None:
    def told(variant: str, _: Mapping[str, Any], seed: int) -> Mapping[str, float]:
        return {"error": 5.0 - gains[seed] if variant == "good" else 5.0}

    claim = Claim("good is better", "error", "good", "plain")
    grid = dataclasses.replace(GRID, search=({},), measure=told, claims=(claim,), reduced=None)
    assert grid.run(path=tmp_path / "toy.json")["claims"][0]["holds"] is holds


def test_intervals() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] == pytest.approx(2 + 4.30 / 3**0.5, abs=1e-2)
    rows = [{"numbers": {"x": value}} for value in (1.0, 2.0, 3.0)]
    assert bounds(rows) == {"x": (-2.0, 6.0)}
    assert bounds(rows[:2]) == {}
