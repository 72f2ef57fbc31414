"""`attnbias steer` with every kind of rule, on documents, images and named spans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnbias as ab
from attnbias.cli import main
from tests.hub import processors
from tests.steer import models

PROMPT = "Once upon a time there was a dog"


RULES: dict[str, Callable[[], Any]] = {
    "bias": lambda: ab.rules.KeyShift(keys="document 0", amount=4.0, heads="all"),
    "bias on a named span": lambda: ab.rules.PASTA(keys="hero", heads="all"),
    "bias while decoding": lambda: ab.rules.LocoRE(beta=3.0, heads="all"),
    "reallocate": lambda: ab.rules.SplitSoftmax(power=0.2, heads="all"),
    "prepare": lambda: ab.rules.FoundInTheMiddle(
        dummy=(300, 301), temperature=1e-4, layers=range(5), heads="all"
    ),
    "pattern": lambda: ab.rules.HardPattern(keys="document 0", heads="all"),
    "hidden": lambda: ab.rules.PersonaVector(directions={2: [3.0] * 64}),
    "logits": lambda: ab.rules.DeCoRe(heads=[(1, 0), (2, 3)], strength=2.0),
}


def arguments(model: Path, recipe: Path, *more: str) -> list[str]:
    return ["steer", str(model), "--recipe", str(recipe), "--prompt", PROMPT, *more]


@torch.no_grad()
@pytest.mark.parametrize("kind", sorted(RULES))
def test_every_kind_of_rule(
    kind: str,
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both texts are those that the library gives for the same prompt, and they differ."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("COLUMNS", "1000")
    documents = ["The cat was red.", "The sun was big."]
    files = []
    for number, text in enumerate(documents):
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text(text)
    rule = RULES[kind]()
    ab.Recipe((rule,), str(stories)).save(tmp_path / "r.json")
    more = ["--system", "Tell a story.", "--span", "hero=document 1", "--max-new-tokens", "16"]
    given = ["--documents", *map(str, files), *more]
    assert main(arguments(stories, tmp_path / "r.json", *given)) == 0
    printed = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(stories).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    prompt = ab.prompt(tokenizer, PROMPT, documents=documents, system="Tell a story.")
    prompt.spans["hero"] = prompt.spans["document 1"]
    inputs = {name: prompt.inputs[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 16, "do_sample": False}
    ids = [model.generate(**inputs, **options)]
    with ab.steer(model, rule, prompt=prompt):
        ids.append(model.generate(**inputs, **options))
    plain, steered = (
        tokenizer.decode(one[0, len(prompt.tokens) :], skip_special_tokens=True) for one in ids
    )
    flat = " ".join(printed.replace("│", " ").split())
    for text in (plain, steered):
        assert " ".join(text.split()) in flat
    assert plain != steered
    start, stop = prompt.spans["document 1"]
    assert f"hero {start}:{stop}" in flat


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    folder = tmp_path / "llava"
    processor = processors.processor("llava")
    model: Any = models.llava().model
    model.config.image_token_id = processor.tokenizer.convert_tokens_to_ids("<image>")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processors.picture().save(tmp_path / "a.png")
    return folder


@torch.no_grad()
def test_an_image_is_a_span(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = ab.rules.KeyShift(keys="image", amount=5.0, heads="all", towers=("text",))
    ab.Recipe((rule,), str(llava)).save(tmp_path / "r.json")
    given = arguments(llava, tmp_path / "r.json", "--max-new-tokens", "8")
    given[given.index(PROMPT)] = "what is in the picture"
    assert main([*given, "--image", str(tmp_path / "a.png")]) == 0
    printed = capsys.readouterr().out
    assert "image " in printed
    assert "The texts part at new token" in printed
    assert main(given) == 2
    assert "add --image FILE" in line(capsys.readouterr().err)


def line(error: str) -> str:
    lines = [one for one in error.splitlines() if "note: the recipe was made" not in one]
    (found,) = lines
    assert found.startswith("attnbias: ")
    return found


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "needs the span 'document 1', and the prompt has first, generated, question: add "
             "--documents FILE"),
        (("--span", "document 1=3"), "there is no span '3'"),
        (("--span", "document 1"), "write NAME=START:STOP"),
        (("--span", "document 1=5:2"), "START below STOP"),
        (("--span", "document 1=-1:2"), "START below STOP"),
        (("--span", "document 1=900:"), "starts at 900; the prompt has"),
        (("--span", "document 1=none"), "there is no span 'none'; there are first"),
        (("--documents", "none.txt"), "--documents 'none.txt' cannot be read"),
        (("--image", "n.png", "--span", "document 1=1:3"), "does not write about images"),
    ],
)  # fmt: skip
def test_what_is_missing_is_one_line(
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    words: str,
) -> None:
    rule = ab.rules.KeyShift(keys="document 1", amount=4.0, heads="all")
    ab.Recipe((rule,), str(stories)).save(tmp_path / "r.json")
    assert main(arguments(stories, tmp_path / "r.json", *more)) == 2
    assert words in line(capsys.readouterr().err)


def test_a_rule_that_was_not_fitted_says_how(
    stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(
        '{"format": 1, "model": "m", "rules": [{"rule": "ZeroTuning", "heads": "all"}]}'
    )
    assert main(arguments(stories, tmp_path / "r.json")) == 2
    assert "fit(model, examples)" in line(capsys.readouterr().err)
