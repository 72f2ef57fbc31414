"""`attnbias support` and `attnbias fuse`: what they say, and what they refuse in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from attnbias.cli import main
from attnbias.cli.support import told
from attnbias.fuse import known
from tests.fuse.test_t5 import SMALL

BASE = "transformers.models"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved T5 with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("t5")
    T5ForConditionalGeneration(T5Config(**SMALL)).save_pretrained(where)
    return where


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def complains(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("attnbias: ")
    assert err.count("\n") == 1, err
    return err


# One model ----------------------------------------------------------------------------------------


def test_a_folder(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    """From its config alone: the weights are not read."""
    weights = next(folder.glob("*.safetensors"))
    kept = weights.read_bytes()
    weights.write_bytes(b"")
    try:
        out = said(capsys, "support", str(folder))
    finally:
        weights.write_bytes(kept)
    assert out.startswith(f"T5ForConditionalGeneration ({folder})\n")
    assert "(6 T5Attention): T5 buckets" in out
    assert "observe, steer: 6 attention layers use the interface (2 of encoder" in out


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("t5", "fuse: encoder.block.0.layer.0.SelfAttention and 17 more (18 T5Attention)"),
        ("bert", "fuse: nothing. It holds no attention with a bias that is known."),
        ("bert", "observe, steer: 12 attention layers use the interface (12 of text)"),
        ("wavlm", "left alone: encoder.layers.0-11.attention (12 WavLMAttention): each query"),
        ("wavlm", "observe, steer: no. WavLMModel does not call the attention interface"),
        ("mpt", "MptAttention): ALiBi"),
    ],
)
def test_a_type(capsys: pytest.CaptureFixture[str], kind: str, words: str) -> None:
    out = said(capsys, "support", kind)
    assert "(the default config of its type)" in out
    assert words in out


def test_the_oldest_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    since = known.oldest(f"{BASE}.t5.modeling_t5.T5Attention", "t5")
    assert f"T5 buckets; transformers {since} or newer" in said(capsys, "support", "t5")


# The table ----------------------------------------------------------------------------------------

ROWS = [
    known.Row("transformers.models.a.modeling_a.A", "fused", "f", "slopes", ("alibi",), "5.2.0"),
    known.Row("transformers.models.a.modeling_a.L1", "carries", "f", "for A", ("alibi",)),
    known.Row("transformers.models.a.modeling_a.L2", "carries", "f", "for A", ("alibi",)),
    known.Row("transformers.models.b.modeling_b.B", "refused", "", "it may not.", ("alibi",)),
    known.Row("transformers.models.c.modeling_c.C", "unknown", "", "nobody.", ("alibi",)),
    known.Row("other.place.D", "fused", "g", "pairs"),
]


def test_the_table_for_people() -> None:
    lines = told(ROWS, "5.99.0").splitlines()
    assert lines[:5] == [
        "transformers 5.99.0:",
        "     2 classes  computed by `attnbias.fuse`",
        "     2 classes  make or pass a bias that another class attends with",
        "     1 classes  refused",
        "     1 classes  unknown",
    ]
    assert "  fused    A: slopes [f], transformers 5.2.0 or newer" in lines
    assert "  carries  L1, L2: for A" in lines
    assert "  refused  B: it may not." in lines
    assert "  unknown  C: nobody." in lines
    assert "  fused    D: pairs [g]" in lines
    assert "other.place" in lines


def test_the_table_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["path"]: row for row in json.loads(said(capsys, "support", "--all", "--json"))}
    assert rows == {row.path: {**row.as_dict(), "signs": list(row.signs)} for row in known.table()}
    row = rows[f"{BASE}.t5.modeling_t5.T5Attention"]
    assert (row["status"], row["family"], row["why"]) == ("fused", "t5", "T5 buckets")


# Fusing -------------------------------------------------------------------------------------------


def test_fuse_says_what_it_did(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    out = said(capsys, "fuse", str(folder), "--length", "48", "--batch", "2")
    assert out.startswith("T5ForConditionalGeneration on cpu: 6 attention modules fused")
    assert "x (2 x 48)" in out
    out = said(capsys, "fuse", str(folder), "--no-measure")
    assert "not measured" in out


def test_fuse_with_random_weights(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    out = said(capsys, "fuse", str(tmp_path), "--random", "--no-measure")
    assert "6 attention modules fused" in out
    assert "could not be loaded" in complains(capsys, "fuse", str(tmp_path))


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["support"], "give either a MODEL or --all"),
        (["support", "t5", "--all"], "give either a MODEL or --all"),
        (["support", "t5", "--json"], "--json goes with --all"),
        (["support", "no-such-model-anywhere"], "could not be loaded"),
        (["support", "./nowhere"], "no such folder"),
        (["fuse", "t5"], "which has no weights; add --random"),
        (["fuse", "t5", "--random", "--length", "0"], "'0'"),
        (["fuse", "t5", "--random", "--batch", "two"], "'two'"),
        (["fuse", "timm_wrapper", "--random"], "timm_wrapper"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], argv: list[str], words: str
) -> None:
    assert words in complains(capsys, *argv)


def test_a_model_without_a_bias_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertConfig(intermediate_size=16, vocab_size=20, **sizes).save_pretrained(tmp_path)
    error = complains(capsys, "fuse", str(tmp_path), "--random")
    assert "holds no attention with a bias that is known" in error
