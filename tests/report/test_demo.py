"""The demo: what it prints is measured, and the whole of it runs in its time."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from attnbias.cli.loading import load


def test_the_shift_shown_is_the_shift_made(minilm):
    """In layer 0, where nothing before it moved, factor f takes p to f p / (1 + (f - 1) p)."""
    import attnbias as ab
    from examples import demo

    model, tokenizer, _ = load(str(minilm))
    text = demo.TEXT.read_text("utf-8")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        inputs = tokenizer(text, return_tensors="pt")
        given = model(**inputs, output_attentions=True).attentions[0][0, :, :, 0].double()
    model.set_attn_implementation("sdpa")
    plain = demo.first_token(model, tokenizer, text)
    assert torch.allclose(plain[0], given.mean(-1), atol=1e-6)
    for factor in demo.FACTORS:
        rule = ab.rules.ZeroTuning(factor=factor, heads="all")
        moved = demo.first_token(model, tokenizer, text, rule)
        wanted = (factor * given / (1 + (factor - 1) * given)).mean(-1)
        assert torch.allclose(moved[0], wanted, atol=1e-6)
        assert not torch.allclose(moved[0], plain[0], atol=1e-4)


def test_similarities_are_those_of_the_model(minilm):
    from examples import demo

    model, tokenizer, _ = load(str(minilm))
    found = demo.similarities(model, tokenizer)
    with torch.no_grad():
        vectors = [
            model(**tokenizer(s, return_tensors="pt")).last_hidden_state[0].mean(0)
            for pair in demo.PAIRS
            for s in pair
        ]
    for n, value in enumerate(found):
        alone = torch.nn.functional.cosine_similarity(vectors[2 * n], vectors[2 * n + 1], dim=0)
        assert value == pytest.approx(float(alone), abs=1e-5)
    assert found[0] > found[3] + 0.3  # a paraphrase against two unrelated sentences


def test_the_fused_model_is_the_model(capsys):
    from attnbias.fuse import modes
    from examples import demo

    with modes.taking("fused"):
        demo.fuse(length=160, layers=1, rounds=1)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 attention modules fused" in said
    assert "A position bias of 1 MB is no longer made" in said  # 4 bytes x 8 heads x 160 x 160
    assert float(said.rsplit("outputs: ", 1)[1].rstrip(".")) < 1e-4


@pytest.mark.slow
def test_the_whole_demo(root, tmp_path, minilm):
    """`make demo` without the installation: under two minutes, with its page and its picture."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "examples.demo", "--out", str(tmp_path)],
        cwd=root, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - start < 120
    said = " ".join(done.stdout.split())
    assert "bit for bit the same" in said
    assert "times faster" in said
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")
