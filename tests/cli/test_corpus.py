"""`attnbias observe --corpus`: what it writes, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from attnbias.cli import main
from attnbias.cli.corpus import statistics
from attnbias.errors import AttnbiasError
from attnbias.observe import corpus


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = ["Once upon a time there was a dog.", "Tim ran to the park and saw a cat.", "The end."]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def test_the_table_and_its_files(
    stories: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pyarrow", reason="parquet: pyarrow is not installed")
    out = tmp_path / "run"
    given = ["observe", str(stories), "--corpus", str(texts), "--out", str(out), "--layers", "0,2"]
    assert main([*given, "--format", "csv, json,parquet", "--confidence", "0.9"]) == 0
    printed, said = capsys.readouterr()
    assert "mean over 3 documents ± half of its 90% interval" in printed
    assert said.startswith("3 documents, ")
    assert {p.name for p in out.iterdir()} == {
        "run.json", "part-0.jsonl", "table.csv", "table.json", "table.parquet",
    }  # fmt: skip
    payload = json.loads((out / "table.json").read_text())
    assert payload["confidence"] == 0.9
    assert payload["settings"]["weights"].startswith("model.safetensors, SHA-256 ")
    assert payload["settings"]["corpus"]["name"] == "texts.jsonl"
    assert {row[1] for row in payload["rows"]} == {0, 2}
    table = corpus.load(out, confidence=0.9)
    assert table.to_csv() == (out / "table.csv").read_text()
    assert main(given) == 0
    assert "half of its 95% interval" in capsys.readouterr().out


def test_sampled(stories: Path, tmp_path: Path, shared: Path) -> None:
    text = (shared / "data" / "tinyshakespeare.txt").read_text()
    path = tmp_path / "play.txt"
    path.write_text("\n\n".join(text[:4000].split("\n\n")[:12]))
    given = ["observe", str(stories), "--corpus", str(path), "--statistics", "distance,peak"]
    assert main([*given, "--out", str(tmp_path / "a"), "--queries", "8", "--seed", "3"]) == 0
    assert main([*given, "--out", str(tmp_path / "b")]) == 0
    part, whole = (corpus.load(tmp_path / name) for name in "ab")
    near = [abs(p.mean - w.mean) < p.high - p.low for p, w in zip(part, whole, strict=True)]
    assert sum(near) / len(near) > 0.95
    assert [r.mean for r in part] != [r.mean for r in whole]


def test_statistics_by_label() -> None:
    found = statistics("entropy, received[queries],sink_rate[0.2, 5],offset[-3]")
    assert found is not None
    assert [(type(one).__name__, one.parameters()) for one in found[:3]] == [
        ("Entropy", {}),
        ("Received", {"denominator": "queries"}),
        ("SinkRate", {"threshold": 0.2, "token": 5}),
    ]
    assert found[-1].parameters() == {"by": -3}
    assert statistics(None) is None


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--queries", "1"], "queries must be a whole number of 2 or more, got 1"),
        (["--statistics", "entropy,nothing"], "no statistic is called 'nothing'"),
        (["--statistics", "received[most]"], "Received(denominator) is one of"),
        (["--statistics", "entropy[1]"], "--statistics 'entropy[1]'"),
        (["--statistics", "a b"], "write names as in entropy,received[queries]"),
        (["--statistics", "given[x]"], "Given needs the span x"),
        (["--format", "csv,xls"], "--format 'csv,xls': write some of csv, parquet, json"),
        (["--confidence", "95"], "confidence must lie between 0 and 1, got 95.0"),
        (["--interval", "z"], "invalid choice: 'z'"),
        (["--text", "x.txt"], "--text is for one text or image"),
        (["--report", "x.html"], "--report is for one text or image"),
        (["--max-tokens", "9999"], "max_tokens: 9999 came; write a number from 1 to 512"),
        (["--layers", "9"], "there is no layer 9"),
    ],
)
def test_bad_options_are_one_line(
    stories: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    more: list[str], words: str,
) -> None:  # fmt: skip
    out = tmp_path / "run"
    given = ["observe", str(stories), "--corpus", str(texts), "--out", str(out), *more]
    assert main(given) == 2
    printed, error = capsys.readouterr()
    assert printed == ""
    assert error.startswith("attnbias: ")
    assert error.count("\n") == 1
    assert words in error
    assert not out.exists()


def test_options_that_belong_together(
    stories: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["observe", str(stories), "--corpus", str(texts)]) == 2
    assert "--corpus needs --out DIR" in capsys.readouterr().err
    for more in (["--out", "x"], ["--queries", "8"], ["--seed", "2"], ["--interval", "bootstrap"]):
        assert main(["observe", str(stories), "--text", str(texts), *more]) == 2
        assert f"{more[0]} is for a corpus" in capsys.readouterr().err
    out = tmp_path / "run"
    given = ["observe", str(stories), "--corpus", str(texts), "--out", str(out)]
    assert main([*given, "--statistics", "peak"]) == 0
    capsys.readouterr()
    assert main([*given, "--statistics", "entropy"]) == 2
    assert "holds a run with statistics" in capsys.readouterr().err


def test_parquet_without_pyarrow_is_said_before_anything_runs(
    stories: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    given = ["observe", str(stories), "--corpus", str(texts), "--out", str(tmp_path / "run")]
    assert main([*given, "--format", "parquet"]) == 2
    assert "pip install 'attnbias[parquet]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_environment_of_a_launcher_is_read_or_refused(
    stories: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = ["observe", str(stories), "--corpus", str(texts), "--out", str(tmp_path / "run")]
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(given) == 2
    assert "WORLD_SIZE is 'two'; it must be a number" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(given) == 2
    assert "start with torchrun" in capsys.readouterr().err
    with pytest.raises(AttnbiasError, match="holds no corpus run"):
        corpus.load(tmp_path / "run")
