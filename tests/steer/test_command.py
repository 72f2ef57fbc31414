"""`attnbias steer` from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.cli import main

PROMPT = "Once upon a time there was a dog"


@pytest.fixture
def recipe(tmp_path: Path, stories: Path) -> Path:
    path = tmp_path / "recipe.json"
    rules = [ab.rules.KeyShift(keys="question", amount=3.0, heads=[0, 1, 2])]
    ab.Recipe(rules, str(stories)).save(path)
    return path


@torch.no_grad()
def test_both_texts_side_by_side(
    stories: Path, recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The texts are those that the library gives for the same prompt."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("COLUMNS", "400")
    before = sorted(recipe.parent.iterdir())
    arguments = ["steer", str(stories), "--recipe", str(recipe), "--prompt", PROMPT]
    assert main([*arguments, "--max-new-tokens", "24"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    model = AutoModelForCausalLM.from_pretrained(stories)
    prompt = ab.prompt(tokenizer, PROMPT)
    options = {"max_new_tokens": 24, "do_sample": False}
    ids = [model.generate(**prompt.inputs, **options)]
    with ab.steer(model, *ab.Recipe.load(recipe).rules, spans=prompt.spans):
        ids.append(model.generate(**prompt.inputs, **options))
    plain, steered = (
        tokenizer.decode(one[0, len(prompt.tokens) :], skip_special_tokens=True) for one in ids
    )
    assert plain != steered
    flat = " ".join(printed.out.replace("│", " ").split())
    for text in (plain, steered):
        assert " ".join(text.split()) in flat
    assert "KeyShift" in printed.out
    assert "The texts part at new token" in printed.out
    assert sorted(recipe.parent.iterdir()) == before


def test_says_so_when_nothing_changes(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.json"
    ab.Recipe([ab.rules.KeyShift(keys=[0], amount=0.0, heads="all")], "another/model").save(path)
    arguments = ["steer", str(stories), "--recipe", str(path), "--prompt", PROMPT]
    assert main([*arguments, "--max-new-tokens", "3"]) == 0
    printed = capsys.readouterr()
    assert "did not change a single token" in printed.out
    assert "the recipe was made for 'another/model'" in printed.err


def line(error: str) -> str:
    assert error.startswith("attnbias: ")
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--recipe": "none.json"}, "none.json cannot be read: No such file"),
        ({"--prompt": "  "}, "--prompt holds no word"),
        ({"--prompt": "word " * 600}, "is more than the 512|more than the"),
        ({"--max-new-tokens": "0"}, "--max-new-tokens"),
        ({"--max-new-tokens": "100000"}, "more than the"),
        ({"--device": "nowhere"}, "--device"),
        ({"--dtype": "int3"}, "--dtype"),
        ({"model": "no/such/model"}, "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    stories: Path,
    recipe: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    words: str,
) -> None:
    given = {"model": str(stories), "--recipe": str(recipe), "--prompt": PROMPT} | change
    arguments = ["steer", given.pop("model"), *(word for pair in given.items() for word in pair)]
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert __import__("re").search(words, line(printed.err)), printed.err


def test_an_encoder_and_an_unknown_layer(
    stories: Path, minilm: Path, tmp_path: Path, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ab.Recipe([ab.rules.KeyShift(keys=[0], amount=1.0, heads="all")], str(minilm)).save(recipe)
    arguments = ["--recipe", str(recipe), "--prompt", PROMPT]
    assert main(["steer", str(minilm), *arguments]) == 2
    assert "writes no text" in line(capsys.readouterr().err)
    found = json.loads(recipe.read_text())
    found["model"] = str(stories)
    found["rules"][0]["layers"] = [40]
    recipe.write_text(json.dumps(found))
    assert main(["steer", str(stories), *arguments]) == 2
    assert "names layer 40, but the model has layers 0 to 4" in line(capsys.readouterr().err)
