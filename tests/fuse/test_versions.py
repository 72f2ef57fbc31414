"""The search for the oldest transformers, and the table that it has recorded."""

from __future__ import annotations

from typing import Any

import pytest

from attnbias.fuse import FAMILIES, known
from tests import versions

ALL = versions.VERSIONS


def search(works_from: dict[str, str], floor: str = "5.2.0") -> dict[str, dict[str, str]]:
    """The runs that the search makes where each case works from a version on."""
    tried: dict[str, dict[str, str]] = {}
    while version := versions.following(works_from, tried, floor):
        assert version not in tried
        tried[version] = {
            case: "" if ALL.index(version) >= ALL.index(first) else f"no {case}"
            for case, first in works_from.items()
        }
    return tried


@pytest.mark.parametrize("first", ALL)
def test_the_search_finds_the_oldest(first: str) -> None:
    tried = search({"a": first, "b": "5.2.0"})
    good, reason = versions.oldest("a", tried)
    assert good == first
    before = ALL.index(first) - 1
    assert reason == (f"{ALL[before]}: no a" if before >= 0 else "")
    assert versions.oldest("b", tried) == ("5.2.0", "5.1.0: no b")
    assert len(tried) <= 12


def test_what_fails_on_the_newest_has_no_oldest() -> None:
    tried = {version: {"a": "broken"} for version in (ALL[-1], "5.2.0")}
    assert versions.following(["a"], tried, "5.2.0") is None
    assert versions.oldest("a", tried) == ("", f"{ALL[-1]}: broken")
    lost = {ALL[-1]: {"a": ""}, "5.2.0": {"*": "no such module"}}
    assert versions.oldest("a", lost) == (ALL[-1], "5.2.0: no such module")


REPORT = """<testsuites><testsuite>
<testcase classname="tests.fuse.test_x.TestA" name="test_eval[1]"/>
<testcase classname="tests.fuse.test_x.TestB" name="test_eval[1]"><failure message="no&#10;x"/>
</testcase>
<testcase classname="tests.fuse.test_x.TestB" name="test_eval[2]"/>
<testcase classname="tests.fuse.test_x.TestC" name="test_eval[2]"><skipped/></testcase>
<testcase classname="tests.fuse.test_x" name="test_alone"><failure message="no"/></testcase>
</testsuite></testsuites>"""


def test_reports_are_read() -> None:
    passed = {"test_x::TestA": "", "test_x::TestB": "test_eval[1]: no"}
    assert versions.outcomes(REPORT) == {"test_x": passed}
    broken = '<testcase classname="" name="tests.fuse.test_x"><error message="gone"/></testcase>'
    assert versions.outcomes(f"<a>{broken}</a>") == {"test_x": {"*": "tests.fuse.test_x: gone"}}


def test_the_table_takes_the_newest_of_what_the_cases_need() -> None:
    runs = {
        "test_x": {"5.2.0": {"test_x::TestA": "", "test_x::TestB": "bad"},
                   "5.23.0": {"test_x::TestA": "", "test_x::TestB": ""}},
    }  # fmt: skip
    a, b = "transformers.A", "transformers.B"
    classes = {"test_x::TestA": {a: "f"}, "test_x::TestB": {a: "f", b: "f", "own.C": "g"}}
    made = versions.table(runs, classes)
    assert made["classes"][a]["oldest"] == "5.23.0"
    assert made["classes"][a]["below"] == "5.2.0: bad"
    assert made["classes"].keys() == {a, b}
    assert made["families"] == {"f": {"oldest": "5.23.0"}}
    assert made["ran"] == ["5.2.0", "5.23.0"]


# What is recorded ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return known.versions()


def test_every_family_is_recorded(recorded: dict[str, Any]) -> None:
    """Run `python -m tests.versions FILE` for a family that is new."""
    for family in FAMILIES:
        if not any(path.startswith("transformers.") for path in family.modules):
            continue  # they are the same on every version
        assert recorded["families"][family.name]["oldest"] in ALL
        for path in family.modules:
            row = recorded["classes"].get(path)
            if row is not None:
                assert row["family"] == family.name
                assert row["oldest"] in ALL
