"""The mutant runner is itself able to fail: survivors, stale texts and broken files are named."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.mutants.__main__ import DEFECTS
from tests.mutants.runner import Defect, check, plant, table

TEST = "test_small.py::test_double"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A tree with one function and one test that knows it for one value only."""
    root = tmp_path / "project"
    root.mkdir()
    (root / "small.py").write_text("def double(x):\n    return x + x\n")
    (root / "test_small.py").write_text(
        "from small import double\n\n\ndef test_double():\n    assert double(2) == 4\n"
    )
    return root


def test_caught_survivor_stale_and_broken(project: Path) -> None:
    defects = [
        Defect("wrong-sign", "small.py", "x + x", "x - x", (TEST,)),
        Defect("survivor", "small.py", "x + x", "x * x", (TEST,)),
        Defect("stale", "small.py", "x + y", "x - y", (TEST,)),
        Defect("twice", "small.py", "x", "y", (TEST,)),
        Defect("broken", "small.py", "return x + x", "return x +", (TEST,)),
        Defect("no-such-test", "small.py", "x + x", "x - x", ("test_small.py::test_gone",)),
    ]
    before = (project / "small.py").read_text()
    verdicts = {v.name: v for v in check(defects[:5], project, jobs=2)}
    assert (project / "small.py").read_text() == before
    assert verdicts["(the original)"].good
    assert verdicts["wrong-sign"].good
    for name in ("survivor", "stale", "twice", "broken"):
        assert not verdicts[name].good, name
    assert verdicts["survivor"].words == "SURVIVED"
    assert "0 times" in verdicts["stale"].words
    assert "1 of 5 defects caught" in table(list(verdicts.values()))
    # A test that is not there makes the original fail, and nothing is read from the rest.
    (only,) = check(defects[5:], project, jobs=1)
    assert not only.good


def test_a_failing_original_stops_the_run(project: Path) -> None:
    (project / "small.py").write_text("def double(x):\n    return 3 * x\n")
    verdicts = check([Defect("any", "small.py", "3 * x", "4 * x", (TEST,))], project, jobs=1)
    assert [v.good for v in verdicts] == [False]


def test_kept_defects_fit_the_tree() -> None:
    """Every kept defect can still be planted, and its tests exist."""
    names = [defect.name for defect in DEFECTS]
    assert len(names) == len(set(names))
    for defect in DEFECTS:
        plant(defect, (ROOT / defect.file).read_text(encoding="utf-8"))
        assert defect.tests, f"{defect.name} names no test"
        for test in defect.tests:
            file, _, name = test.partition("::")
            assert (ROOT / file).exists(), f"{defect.name}: no {test}"
            first = name.partition("::")[0].partition("[")[0]
            assert not first or first in _names(ROOT / file), f"{defect.name}: no {test}"


@functools.cache
def _names(path: Path) -> set[str]:
    """Functions and classes of a test file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
