"""`attnbias observe` from end to end: files that say the same, and one line for what cannot be."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from attnbias.cli import main
from attnbias.cli.observe import layer_numbers
from attnbias.errors import AttnbiasError


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.", "utf-8")
    return path


def refused(capsys, *arguments: object) -> str:
    """The one line on standard error of a command that must exit with 2."""
    assert main(["observe", *map(str, arguments)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    assert lines[0].startswith("attnbias: ")
    return lines[0]


def test_writes_everything_that_is_asked_for(minilm, text, tmp_path, capsys, monkeypatch):
    from attnbias.report import page as pages

    # Thirty pictures take half a minute; what they show is looked at in test_page.
    drawn = {"words.png": b"a", "entropy.svg": b"b"}
    monkeypatch.setattr(pages, "figures", lambda data: drawn)
    out = {kind: tmp_path / f"out.{kind}" for kind in ("html", "png", "csv", "json")}
    figures = tmp_path / "figures"
    figures.mkdir()
    code = main([
        "observe", str(minilm), "--text", str(text), "--report", str(out["html"]),
        "--png", str(out["png"]), "--csv", str(out["csv"]), "--json", str(out["json"]),
        "--layers", "0,2-4", "--svg", str(tmp_path / "out.svg"), "--figures", str(figures),
    ])  # fmt: skip
    told = capsys.readouterr().out
    assert code == 0
    data = json.loads(out["json"].read_text("utf-8"))
    page = out["html"].read_text("utf-8")
    assert data["layers"] == [["text", n] for n in (0, 2, 3, 4)]
    assert data["text_sha256"] in page
    assert data["revision"].removeprefix("model.safetensors, SHA-256 ") in page
    assert "--layers 0,2-4" in page
    assert out["png"].read_bytes().startswith(b"\x89PNG")
    assert out["csv"].read_text("utf-8").count("\n") == 1 + 4 * 12 * len(data["maps"])
    assert {path.name: path.read_bytes() for path in figures.iterdir()} == drawn
    assert b"<svg" in (tmp_path / "out.svg").read_bytes()
    assert "Attention is not importance" in " ".join(told.split())
    assert str(tmp_path) not in page  # no path of the machine leaves it


def test_two_texts_two_reports_and_a_recipe_compared(minilm, text, tmp_path, capsys):
    """One page for two texts; the same from two saved reports; a recipe beside no recipe."""
    from attnbias.steer import Recipe, rules

    other = tmp_path / "other.txt"
    other.write_text(
        "A dog ran over the hill, and a cat slept in the warm sun all day long.", "utf-8"
    )
    first, second, page = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "page.html"
    base = ["observe", str(minilm), "--layers", "0,1"]
    assert main([*base, "--text", str(text), "--json", str(first), "--compare", str(other),
                 "--report", str(page)]) == 0  # fmt: skip
    told = capsys.readouterr().out
    assert "Beside the second run: In " in " ".join(told.split())
    assert "B: <bdi>A dog ran over the hill" in page.read_text("utf-8")
    assert main([*base, "--text", str(other), "--json", str(second)]) == 0
    again = tmp_path / "again.html"
    assert main(["observe", str(first), "--compare", str(second), "--report", str(again)]) == 0
    cards = [
        one.read_text("utf-8").partition('id="compare"')[2].partition("</section>")[0]
        for one in (page, again)
    ]
    assert cards[0] == cards[1] != ""

    recipe = tmp_path / "recipe.json"
    blocked = rules.BlockHeads(heads=((0, 3),), mode="uniform")
    Recipe((blocked,), str(minilm)).save(recipe)
    assert main([*base, "--text", str(text), "--compare", str(recipe), "--report", str(page)]) == 0
    shown = page.read_text("utf-8").partition('id="compare"')[2].partition("</section>")[0]
    assert "recipe.json: BlockHeads" in shown
    assert "layer 0, head 3" in shown


def test_comparisons_that_cannot_be(minilm, text, tmp_path, capsys):
    page = ("--report", tmp_path / "p.html")
    saved = tmp_path / "a.json"
    assert main(["observe", str(minilm), "--text", str(text), "--json", str(saved),
                 "--layers", "0"]) == 0  # fmt: skip
    capsys.readouterr()
    given = (minilm, "--text", text)
    assert "--report" in refused(capsys, *given, "--compare", text)
    assert "another saved report" in refused(capsys, saved, "--compare", text, *page)
    assert "leave --text out" in refused(capsys, saved, "--text", text)
    broken = tmp_path / "b.json"
    broken.write_text("{not json")
    assert "not a JSON file" in refused(capsys, *given, "--compare", broken, *page)
    broken.write_text('{"schema": "attnbias.report/1"}')
    assert "attnbias.report/2" in refused(capsys, *given, "--compare", broken, *page)
    assert "not a folder" in refused(capsys, *given, "--figures", tmp_path / "none")
    assert "--text" in refused(capsys, minilm)


def test_summary_alone_on_a_decoder(stories, text, capsys):
    assert main(["observe", str(stories), "--text", str(text), "--dtype", "float64"]) == 0
    assert "Same architecture, random weights" in " ".join(capsys.readouterr().out.split())


def test_the_text_may_come_from_standard_input(minilm, capsys, monkeypatch):
    import io
    import sys

    class Stdin:
        buffer = io.BytesIO(b"Some words, and a few more.")

    monkeypatch.setattr(sys, "stdin", Stdin())
    assert main(["observe", str(minilm), "--text", "-", "--layers", "0"]) == 0


def test_bad_texts(minilm, tmp_path, text, capsys):
    out = tmp_path / "out.html"
    long = tmp_path / "long.txt"
    long.write_text("many words " * 600)
    raw = tmp_path / "raw.txt"
    raw.write_bytes(b"\xff\xfe\x00\x80")
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    write = ("--report", out)
    assert "accepts" in refused(capsys, minilm, "--text", long, *write)
    assert "--max-tokens" in refused(capsys, minilm, "--text", long, *write)
    assert "not UTF-8" in refused(capsys, minilm, "--text", raw, *write)
    assert "no word" in refused(capsys, minilm, "--text", empty, *write)
    assert "cannot be read" in refused(capsys, minilm, "--text", tmp_path / "none", *write)
    assert not out.exists()
    assert main(["observe", str(minilm), "--text", str(long), "--max-tokens", "20"]) == 0


def test_bad_options(minilm, tmp_path, text, capsys):
    missing = tmp_path / "no" / "out.html"
    given = (minilm, "--text", text)
    assert "does not exist" in refused(capsys, *given, "--report", missing)
    both = ("--csv", tmp_path / "same", "--json", tmp_path / "same")
    assert "two outputs" in refused(capsys, *given, *both)
    assert "--layers" in refused(capsys, *given, "--layers", "2-x")
    assert "99" in refused(capsys, *given, "--layers", "99", "--json", tmp_path / "o.json")
    assert "--device" in refused(capsys, *given, "--device", "nonsense")
    assert sorted(os.listdir(tmp_path)) == ["text.txt"]


def test_bad_models(tmp_path, text, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    out = tmp_path / "out.html"
    write = ("--text", text, "--report", out)
    assert "no such folder" in refused(capsys, tmp_path / "none", *write)
    assert "config.json" in refused(capsys, folder, *write)
    assert "could not be loaded" in refused(capsys, "no-such-org/no-such-model", *write)
    (folder / "config.json").write_text("{ not json")
    assert "could not be loaded" in refused(capsys, folder, *write)
    assert not out.exists()


def test_models_that_do_not_read_text(tmp_path, text, capsys):
    from transformers import BartConfig, CLIPConfig, ViTConfig

    for config, word in ((ViTConfig(), "vit"), (CLIPConfig(), "clip"), (BartConfig(), "bart")):
        folder = tmp_path / word
        config.save_pretrained(folder)
        line = refused(capsys, folder, "--text", text)
        assert word in line
        assert "encoder-decoder" in line or "not a text model" in line


def test_a_model_that_ignores_the_attention_interface(stories, tmp_path, text, capsys):
    from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

    folder = tmp_path / "bloom"
    config = BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4)
    BloomForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    line = refused(capsys, folder, "--text", text, "--report", tmp_path / "out.html")
    assert "Bloom" in line
    assert not (tmp_path / "out.html").exists()


def test_weights_that_are_code_do_not_run(minilm, tmp_path, text, capsys):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    payload = pickle.dumps({"weight": Attack()}, protocol=2)
    (folder / "pytorch_model.bin").write_bytes(payload)
    assert "could not be loaded" in refused(capsys, folder, "--text", text)
    assert not ran.exists()
    pickle.loads(payload)
    assert ran.exists()  # the attack is a real one


def test_code_of_a_model_does_not_run_unasked(minilm, tmp_path, text, capsys):
    folder = tmp_path / "model"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    config["model_type"] = "my-own-type"
    (folder / "config.json").write_text(json.dumps(config))
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Config: pass\n")
    refused(capsys, folder, "--text", text)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("text", "found"), [("all", "all"), ("3", (3,)), ("0,2-4,3", (0, 2, 3, 4)), (" 1 , 2", (1, 2))]
)
def test_layer_numbers(text, found):
    assert layer_numbers(text) == found


@pytest.mark.parametrize("text", ["", "-1", "a", "1,,2", "1-", "4-2", "1e3"])
def test_bad_layer_numbers(text):
    with pytest.raises(AttnbiasError, match="--layers"):
        layer_numbers(text)
