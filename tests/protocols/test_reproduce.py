"""`attnbias reproduce`: it runs, goes on where it stopped, and calls nothing a reproduction
that is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.cli import main
from attnbias.protocols import KINDS, PROTOCOLS, Protocol, protocol, read, reproduce, run
from attnbias.protocols.journal import Journal

WORK = "zerotuning"


def lines(count: int) -> str:
    """Stories whose next word is one of two."""
    items = [
        {
            "question": f"Once upon a time there were {n} dogs. Lily saw the",
            "choices": [" dog", " car"],
            "answer": n % 2,
        }
        for n in range(count)
    ]
    return "".join(json.dumps(item) + "\n" for item in items)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(lines(5))
    return path


@pytest.fixture
def recipe(tmp_path: Path, stories: Path) -> Path:
    path = tmp_path / "recipe.json"
    ab.Recipe((ab.rules.ZeroTuning(factor=0.2, heads="all"),), str(stories)).save(path)
    return path


def arguments(stories: Path, data: Path, recipe: Path, out: Path, *more: str) -> list[str]:
    given = {"--model": stories, "--data": data, "--recipe": recipe, "--out": out}
    return ["reproduce", WORK, *(str(word) for pair in given.items() for word in pair), *more]


def test_three_arms_are_what_the_library_gives(
    stories: Path, data: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The scores of every arm equal those of a plain loop; the result says all that was asked."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out.json"
    assert main(arguments(stories, data, recipe, out)) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    arms: dict[str, tuple[ab.steer.Rule, ...]] = {
        "plain": (),
        "rule": (ab.rules.ZeroTuning(factor=0.2, heads="all"),),
        "control": (ab.rules.KeyShift(keys=(4,), factor=0.2, heads="all"),),
    }
    seen = {name: [row for row in found["rows"] if row["arm"] == name] for name in arms}
    for number, item in enumerate(map(json.loads, data.read_text().splitlines())):
        prompt = tokenizer(item["question"], return_tensors="pt").input_ids
        for name, rules in arms.items():
            totals = []
            for choice in item["choices"]:
                whole = tokenizer(item["question"] + choice, return_tensors="pt").input_ids
                ids = whole[:, prompt.shape[1] :]
                with torch.no_grad():
                    if rules:
                        with ab.steer(model, *rules):
                            logits = model(whole).logits
                    else:
                        logits = model(whole).logits
                logs = logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
                totals.append(float(logs.gather(-1, ids[0, :, None]).sum()))
            want = totals[item["answer"]] - totals[1 - item["answer"]]
            scores = seen[name][number]["scores"]
            assert abs(scores["margin"] - want) < 1e-4
            assert scores["accuracy"] == float(want > 0)
    margins = {name: [row["scores"]["margin"] for row in rows] for name, rows in seen.items()}
    assert margins["plain"] != margins["rule"] != margins["control"]
    assert found["mark"] == "measured"
    assert found["passed"] is False
    assert "not a reproduction" in printed
    assert found["rules"][0]["factor"] == 0.2
    assert found["data"]["fitted on"] == 0
    for name in (
        "command",
        "commit",
        "seeds",
        "environment",
        "seconds",
        "cell",
        "same as the cell",
    ):
        assert name in found
    assert not list(tmp_path.glob("*.part"))


def test_the_rule_is_fitted_on_items_that_are_not_measured(stories: Path, tmp_path: Path) -> None:
    one = protocol(WORK)
    path = tmp_path / "data.jsonl"
    path.write_text(lines(one.fit + 2))
    found = loaded(stories, path)
    assert found["data"]["fitted on"] == one.fit
    assert {row["item"] for row in found["rows"]} == {one.fit, one.fit + 1}
    assert found["rules"][0]["fitted"]["examples"] == one.fit
    path.write_text(lines(one.fit))
    with pytest.raises(ab.AttnbiasError, match="sets 16 aside"):
        loaded(stories, path)


def loaded(stories: Path, path: Path, **more: Any) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    one: Protocol = more.pop("one", protocol(WORK))
    kind = KINDS[one.kind]
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    items = read(path, kind.fields, kind.example)
    tokenizer = AutoTokenizer.from_pretrained(stories)
    return reproduce(one, model, tokenizer, items, **({"name": "tiny"} | more))


# Stopped and gone on with ------------------------------------------------------------------------


def test_a_stopped_run_goes_on_and_gives_the_same(
    stories: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = (ab.rules.ZeroTuning(factor=0.2, heads="all"),)
    whole = loaded(stories, data, rules=rules)
    journal = tmp_path / "j.part"
    answered = []
    real = run._answer

    def counted(*given: Any) -> dict[str, Any]:
        answered.append(given[1].name)
        if len(answered) == 8:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(run, "_answer", counted)
    with pytest.raises(KeyboardInterrupt):
        loaded(stories, data, rules=rules, journal=journal)
    with journal.open("a") as file:
        file.write('{"item": 2, "arm": "ru')  # a crash in the middle of a line
    found = loaded(stories, data, rules=rules, journal=journal)
    assert len(answered) == 8 + 15 - 7
    assert found["rows"] == whole["rows"]
    assert found["gain"] == whole["gain"]


def test_a_journal_of_another_run_is_refused(stories: Path, data: Path, tmp_path: Path) -> None:
    journal = tmp_path / "j.part"
    rules = (ab.rules.ZeroTuning(factor=0.2, heads="all"),)
    loaded(stories, data, rules=rules, journal=journal)
    other = (ab.rules.ZeroTuning(factor=0.3, heads="all"),)
    with pytest.raises(ab.AttnbiasError, match=r"another recipe.*--fresh"):
        loaded(stories, data, rules=other, journal=journal)
    found = loaded(stories, data, rules=other, journal=journal, fresh=True)
    assert found["rules"][0]["factor"] == 0.3
    data.write_text(lines(4))
    with pytest.raises(ab.AttnbiasError, match=r"another data, items"):
        loaded(stories, data, rules=other, journal=journal)


def test_interrupted_on_the_command_line(
    stories: Path,
    data: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = Journal.write

    def stopping(self: Journal, row: dict[str, Any]) -> None:
        real(self, row)
        if len(self.done) == 4:
            raise KeyboardInterrupt

    out = tmp_path / "out.json"
    monkeypatch.setattr(Journal, "write", stopping)
    assert main(arguments(stories, data, recipe, out)) == 130
    assert not out.exists()
    assert "goes on from here" in capsys.readouterr().err
    monkeypatch.setattr(Journal, "write", real)
    assert main(arguments(stories, data, recipe, out)) == 0
    assert len(json.loads(out.read_text())["rows"]) == 15


# What may be called a reproduction ----------------------------------------------------------------


ROWS = [
    {"item": 0, "arm": arm, "scores": {"accuracy": value}}
    for arm, value in (("plain", 0.0), ("rule", 0.5), ("control", 0.25))
]


def marked(**changes: Any) -> Mapping[str, Any]:
    one = protocol(WORK)
    given = {"rule": 0.51, "margin": 0.02, "model": "its/model", "sha256": ("abc",)}
    cell = replace(one.cell, **(given | changes.pop("cell", {})))
    facts = {"model": "its/model", "identity": "commit 12", "sha256": "abc"} | changes
    return run.summary(replace(one, cell=cell), ROWS, **facts)


def test_reproduced_needs_model_data_and_value() -> None:
    assert marked()["mark"] == "reproduced"
    assert marked()["passed"] is True
    for change in (
        {"model": "another/model"},
        {"identity": "model.safetensors, SHA-256 12"},
        {"identity": ""},
        {"sha256": "other"},
        {"cell": {"sha256": ()}},
        {"cell": {"rule": 0.6}},
        {"cell": {"rule": None}},
        {"cell": {"score": "another"}},
    ):
        found = marked(**change)
        assert (found["mark"], found["passed"]) == ("measured", False), change


def test_gains_are_paired_and_follow_what_is_better() -> None:
    found = marked()
    assert found["gain"]["over plain"]["mean"] == 0.5
    assert found["gain"]["over control"]["mean"] == 0.25
    rows = ROWS + [row | {"item": 1} for row in ROWS]
    lower = replace(protocol(WORK), better="lower")
    found = run.summary(lower, rows, model="m", identity="", sha256="")
    assert found["gain"]["over plain"] == {"mean": -0.5, "count": 2, "error": 0.0}


# Bad input ----------------------------------------------------------------------------------------


def line(error: str) -> str:
    assert error.startswith("attnbias: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no item; a line is such as"),
        ("{", "line 1 is no JSON"),
        ("[1]", "line 1 is no object"),
        ('{"question": "a", "choices": ["b"]}', "lacks 'answer'"),
        ('{"question": "a", "choices": [], "answer": 0}', "'choices' must be a list of texts"),
        ('{"question": "a", "choices": ["b"], "answer": true}', "'answer' must be a whole number"),
        ('{"question": "a", "choices": ["b"], "answer": 1}', "there are 1 choices"),
        ('{"question": "a", "choices": ["b"], "answer": 0, "gold": 0}', "there are 0 documents"),
    ],
)
def test_bad_data_is_one_line_and_nothing_is_written(
    stories: Path,
    data: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    text: str,
    words: str,
) -> None:
    data.write_text(text)
    out = tmp_path / "out.json"
    assert main(arguments(stories, data, recipe, out)) == 2
    assert words in line(capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: [a[0], "no-such", *a[2:]], "no protocol for the work 'no-such'"),
        (lambda a: a[:2], "--model is missing"),
        (lambda a: a[:4], "--data is missing: attnbias reproduce zerotuning --model M --data D"),
        (lambda a: [*a, "--limit", "0"], "--limit"),
        (lambda a: [*a, "--out", "no/folder/out.json"], "does not exist"),
        (lambda a: [*a, "--data", "none.jsonl"], "cannot be read"),
    ],
)
def test_bad_arguments(
    stories: Path,
    data: Path,
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[list[str]], list[str]],
    words: str,
) -> None:
    assert main(change(arguments(stories, data, recipe, tmp_path / "out.json"))) == 2
    assert words in line(capsys.readouterr().err)


def test_a_recipe_of_another_work_is_refused(
    stories: Path, data: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ab.Recipe((ab.rules.KeyShift(keys=(1,), amount=1.0, heads="all"),), "m").save(recipe)
    assert main(arguments(stories, data, recipe, tmp_path / "out.json")) == 2
    assert "needs ZeroTuning" in line(capsys.readouterr().err)


def test_the_list_names_every_protocol(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "list"]) == 0
    printed = capsys.readouterr().out
    for name, one in PROTOCOLS.items():
        assert f"{name}  ({one.kind}" in printed
        assert one.cell.where in printed


def test_every_protocol_is_of_a_work_with_that_rule() -> None:
    from attnbias.catalogue import works
    from attnbias.steer.recipe import rule_names

    rows = {row.id: row for row in works()}
    for name, one in PROTOCOLS.items():
        assert one.kind in KINDS
        assert set(one.needs) <= set(rule_names())
        if name in rows:
            assert any(path.rpartition(".")[2] in one.needs for path in rows[name].objects)
