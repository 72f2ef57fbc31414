"""Recipes as files: whole or not at all, validated, open to other packages."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

import attnbias as ab
from tests.steer.sample_rules import SetShare

KeyShift, ZeroTuning = ab.rules.KeyShift, ab.rules.ZeroTuning

SHIFT: dict[str, Any] = {"rule": "KeyShift", "heads": "all", "keys": ["first"], "amount": 1.0}
GOOD: dict[str, Any] = {"format": 1, "model": "some/model", "rules": [SHIFT]}


def load(tmp_path: Path, found: Any) -> ab.Recipe:
    path = tmp_path / "given.json"
    path.write_text(found if isinstance(found, str) else json.dumps(found))
    return ab.Recipe.load(path)


def test_the_smallest_file(tmp_path: Path) -> None:
    recipe = load(tmp_path, GOOD)
    assert recipe.rules == (KeyShift(keys="first", amount=1.0, heads="all"),)
    assert (recipe.model, recipe.revision, recipe.library) == ("some/model", None, "unknown")


def test_the_file_says_what_was_made_with_what(tmp_path: Path) -> None:
    rule = KeyShift(keys=["first", range(2, 5), 9], factor=0.5, heads={3: [1, 2]}, phase="decode")
    ab.Recipe([rule], "some/model", "abc").save(tmp_path / "recipe.json")
    assert json.loads((tmp_path / "recipe.json").read_text()) == {
        "format": 1,
        "library": ab.__version__,
        "model": "some/model",
        "revision": "abc",
        "rules": [
            {
                "rule": "KeyShift",
                "heads": [[3, 1], [3, 2]],
                "phase": "decode",
                "keys": ["first", {"start": 2, "stop": 5}, 9],
                "factor": 0.5,
            }
        ],
    }


def with_rule(**fields: Any) -> dict[str, Any]:
    return GOOD | {"rules": [SHIFT, SHIFT | fields]}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ("[", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"format": 1, "format": 1}', "'format' is there twice"),
        ('{"format": NaN}', "NaN is not a number"),
        ([], "must be an object"),
        (GOOD | {"author": "me"}, "field 'author' is unknown"),
        ({"format": 1, "model": "m"}, "field 'rules' is missing"),
        (GOOD | {"format": 2}, "field 'format' is 2"),
        (GOOD | {"format": True}, "field 'format' is True"),
        (GOOD | {"model": 3}, "field 'model' must be a text"),
        (GOOD | {"model": ""}, "model of a recipe must be a text"),
        (GOOD | {"library": None}, "field 'library' must be a text"),
        (GOOD | {"revision": 3}, "field 'revision' must be a text"),
        (GOOD | {"revision": 0}, "revision.* must be a text"),
        (GOOD | {"rules": []}, "field 'rules' must be a list"),
        (GOOD | {"rules": ["KeyShift"]}, r"field rules\[0\] must be an object"),
        (with_rule(rule="Teleport"), r"rules\[1\]\.rule: there is no rule 'Teleport'"),
        (with_rule(rule="os.system"), r"rules\[1\]\.rule: there is no rule"),
        (with_rule(head=[1]), r"rules\[1\]\.head is unknown"),
        (with_rule(amount="1"), r"rules\[1\]\.amount.*got '1'"),
        (with_rule(amount=True), r"rules\[1\]\.amount.*got True"),
        (with_rule(amount=None), r"rules\[1\]: KeyShift takes either"),
        (with_rule(heads="some"), r"rules\[1\]\.heads must be 'all'"),
        (with_rule(heads=[1.0]), r"rules\[1\]\.heads must be 'all'"),
        (with_rule(heads={"3": [1]}), r"rules\[1\]\.heads"),
        (with_rule(layers=[-1]), r"rules\[1\].*layers must be"),
        (with_rule(phase="later"), r"rules\[1\]\.phase"),
        (with_rule(towers="text"), r"rules\[1\]\.towers"),
        (with_rule(keys=[{"start": 1, "stop": 3, "step": 2}]), r"rules\[1\]\.keys"),
        (with_rule(keys=[{"start": 3, "stop": 1}]), r"rules\[1\]\.keys"),
        (with_rule(keys=[]), r"rules\[1\].*at least one key"),
        (
            GOOD | {"rules": [{"rule": "ZeroTuning", "heads": "all"}]},
            "ZeroTuning has no factor yet",
        ),
        (GOOD | {"rules": [{"rule": "ZeroTuning", "factor": 2.0}]}, r"rules\[0\]\.heads"),
        (
            GOOD | {"rules": [{"rule": "ZeroTuning", "factor": 2.0, "heads": "all", "fitted": 3}]},
            r"rules\[0\]\.fitted",
        ),
    ],
)
def test_refused_in_one_sentence_that_names_file_and_field(
    tmp_path: Path, found: Any, words: str
) -> None:
    with pytest.raises(ab.AttnbiasError, match=words) as caught:
        load(tmp_path, found)
    assert str(caught.value).startswith(str(tmp_path / "given.json"))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "bytes.json"):
        with pytest.raises(ab.AttnbiasError, match="cannot be read"):
            ab.Recipe.load(path)


def test_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.json"
    recipe = ab.Recipe([ZeroTuning(factor=2.0, heads="all")], "some/model")
    recipe.save(path)
    before = path.read_text()
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    other = ab.Recipe([ZeroTuning(factor=3.0, heads="all")], "some/model")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(ab.AttnbiasError, match="cannot be written: No space"):
            other.save(path)
    assert path.read_text() == before
    with pytest.raises(ab.AttnbiasError, match="cannot be saved: it is no rule of attnbias"):
        ab.Recipe([SetShare(keys=[0], share=0.5, heads="all")], "m").save(path)
    with pytest.raises(ab.AttnbiasError, match="cannot be written"):
        recipe.save(tmp_path / "nowhere" / "recipe.json")
    assert [one.name for one in tmp_path.iterdir()] == ["recipe.json"]
    assert path.read_text() == before


def test_a_field_that_json_cannot_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ab.steer.recipe.BUILT_IN, "SetShare", SetShare)
    for share in (float("nan"), object()):
        rule = SetShare(keys=[0], share=share, heads="all")  # type: ignore[arg-type]
        with pytest.raises(ab.AttnbiasError, match="cannot be written as JSON"):
            ab.Recipe([rule], "some/model").save(tmp_path / "recipe.json")
    assert list(tmp_path.iterdir()) == []


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("rules", [(), ["KeyShift"], None, [KeyShift]])
def test_a_recipe_needs_rules(rules: Any) -> None:
    with pytest.raises(ab.AttnbiasError, match="needs a list of rules"):
        ab.Recipe(rules, "some/model")


PLUGIN = """
from dataclasses import dataclass
from attnbias.bias import KeyBias
from attnbias.steer import Rule

@dataclass(frozen=True, kw_only=True)
class Nudge(Rule):
    size: float

    def bias(self, site):
        return KeyBias(site.where((1,)).to(site.dtype)[:, None] * self.size)
"""


def test_another_package_adds_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nudging.py").write_text(PLUGIN)
    info = tmp_path / "nudging-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nudging\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[attnbias.rules]\nnudge = nudging:Nudge\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        found = GOOD | {"rules": [{"rule": "nudge", "heads": [0], "size": 0.5}]}
        recipe = load(tmp_path, found)
        assert type(recipe.rules[0]).__name__ == "Nudge"
        recipe.save(tmp_path / "again.json")
        assert ab.Recipe.load(tmp_path / "again.json") == recipe
        assert json.loads((tmp_path / "again.json").read_text())["rules"][0]["rule"] == "nudge"
        wrong = GOOD | {"rules": [{"rule": "nudge", "heads": [0], "size": "big"}]}
        with pytest.raises(ab.AttnbiasError, match=r"rules\[0\]\.size"):
            load(tmp_path, wrong)
    finally:
        sys.modules.pop("nudging", None)
