"""Both models learn, stop and go on, are saved and used, from Python and from the command line."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from attnbias.errors import AttnbiasError
from attnbias_models import store
from attnbias_models.training import Interrupted, Plan, seeded, train
from attnbias_models.vision import command
from attnbias_models.vision.convit import ConViT, ConViTConfig
from attnbias_models.vision.data import digits, split
from attnbias_models.vision.task import ClassifyTask, logits, score
from attnbias_models.vision.vit import ViT, ViTConfig

SIZES: dict[str, Any] = {
    "size": (8, 8),
    "channels": 1,
    "classes": 10,
    "patch": 2,
    "width": 32,
    "heads": 4,
    "depth": 2,
    "deviation": 0.2,
}
PLAN = Plan(
    steps=70, learning_rate=1e-2, weight_decay=0.05, schedule="cosine", warmup=5, validate_every=20
)


def fresh(name: str, seed: int = 0) -> ViT | ConViT:
    if name == "vit":
        made: ViT = seeded(lambda: ViT(ViTConfig(**SIZES)), seed)
        return made
    other: ConViT = seeded(lambda: ConViT(ConViTConfig(**SIZES, local=1)), seed)
    return other


@pytest.mark.parametrize("name", ["vit", "convit"])
def test_the_loss_falls_and_an_interrupted_run_ends_the_same(name: str, tmp_path: Path) -> None:
    parts = split(digits(), 0)
    task = ClassifyTask(parts.train, parts.valid, batch=32, smoothing=0.1)
    whole = fresh(name)
    before = score(whole, parts.test)["error"]
    plain = train(whole, task, PLAN, progress=False)
    assert sum(plain.losses[-10:]) < 0.75 * sum(plain.losses[:10])
    assert score(whole, parts.test)["error"] < 0.6 * before
    with pytest.raises(Interrupted):
        train(fresh(name), task, PLAN, folder=tmp_path, progress=False, stop_after=33)
    torch.rand(3)  # whatever was drawn between
    again = fresh(name, seed=1)
    resumed = train(again, task, PLAN, folder=tmp_path, progress=False)
    assert resumed.losses == plain.losses
    assert resumed.validations == plain.validations
    loaded, _ = store.load(tmp_path)
    assert type(loaded) is type(whole)
    assert loaded.config == whole.config
    want = logits(whole, parts.test.images)
    assert torch.equal(logits(again, parts.test.images), want)
    assert torch.equal(logits(loaded, parts.test.images), want)


def test_training_moves_gates_and_vectors() -> None:
    parts = split(digits(), 0)
    model = fresh("convit")
    assert isinstance(model, ConViT)
    born, weight = model.gates(), model.get_parameter("blocks.0.attend.weight").detach().clone()
    plan = dataclasses.replace(PLAN, steps=15, warmup=0, schedule="constant")
    train(model, ClassifyTask(parts.train, parts.valid, batch=16), plan, progress=False)
    assert float((model.gates() - born).abs().min()) > 1e-4
    moved = model.get_parameter("blocks.0.attend.weight").detach() - weight
    assert float(moved.abs().max()) > 1e-3


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    code: int = command.run(parser.parse_args(["vision", *words]))
    return code


def train_words(data: Path | str, out: Path, *more: str) -> list[str]:
    small = [f"--set={name}={SIZES[name]}" for name in ("width", "depth", "heads", "deviation")]
    return [
        *("train", "--data", str(data), "--out", str(out), "--batch=8", "--quiet"),
        *("--learning-rate=1e-2", *small, *more),
    ]


def stripes(path: Path, seed: int, labels: bool = True) -> None:
    """Images of 6 x 8 in bytes, with stripes that go across or down."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 120, (60, 6, 8))
    images[::2, ::2] += 100
    images[1::2, :, ::2] += 100
    words = np.array(["across", "down"] * 30)
    if labels:
        np.savez(path, images=images.astype(np.uint8), labels=words)
    else:
        np.savez(path, images=images.astype(np.uint8))


def test_the_command_on_own_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stripes(tmp_path / "a.npz", 0)
    stripes(tmp_path / "b.npz", 1)
    stripes(tmp_path / "c.npz", 1, labels=False)
    out = tmp_path / "out"
    words = train_words(tmp_path / "a.npz", out, "--model=convit", "--steps=60")
    assert call(*words, "--set=local=1", "--set=patch=2") == 0
    printed = capsys.readouterr().out
    for text in ("test", "cross-entropy", "positional share", "0.7"):
        assert text in printed
    config = json.loads((out / "config.json").read_text())
    assert config["extra"]["classes"] == ["across", "down"]
    assert (config["config"]["patch"], config["config"]["local"]) == (2, 1)
    before = (out / "model.safetensors").read_bytes()
    assert call(*words, "--set=local=1", "--set=patch=2") == 0  # finished: nothing more to do
    assert (out / "model.safetensors").read_bytes() == before
    tables = []
    for name in ("b", "c"):
        place = tmp_path / f"{name}.csv"
        assert call("predict", str(out), f"--data={tmp_path / name}.npz", f"--out={place}") == 0
        with place.open(newline="") as file:
            tables.append(list(csv.DictReader(file)))
    assert tables[0] == tables[1]
    assert [row["image"] for row in tables[0]] == [str(number) for number in range(60)]
    right = sum(row["label"] == ("across", "down")[n % 2] for n, row in enumerate(tables[0]))
    assert right >= 54
    assert all(0.5 <= float(row["probability"]) <= 1 for row in tables[0])
    assert f"{60 - right} of 60 differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set=patch=5"], "multiples of patch=5"),
        (["--set=patch=1.5"], "patch must be like 1"),
        (["--set=locality=strong"], "locality must be a number"),
        (["--set=classes=3"], "NAME=VALUE with a name of"),
        (["--set=colour=1"], "NAME=VALUE with a name of"),
        (["--set=local=9"], "one block fewer than depth"),
        (["--share=0"], "share"),
        (["--steps=0"], "steps"),
        (["--data=nowhere"], "'digits', a folder"),
    ],
)
def test_what_cannot_be_trained_writes_nothing(tmp_path: Path, more: list[str], words: str) -> None:
    stripes(tmp_path / "a.npz", 0)
    out = tmp_path / "out"
    with pytest.raises(AttnbiasError, match=words):
        call(*train_words(tmp_path / "a.npz", out, "--model=convit", "--set=local=1", *more))
    assert not out.exists()


def test_what_cannot_be_labelled_writes_nothing(tmp_path: Path) -> None:
    stripes(tmp_path / "a.npz", 0)
    stripes(tmp_path / "c.npz", 0, labels=False)
    out, table = tmp_path / "out", tmp_path / "x.csv"
    with pytest.raises(AttnbiasError, match="no labels"):
        call(*train_words(tmp_path / "c.npz", out, "--model=vit"))
    with pytest.raises(AttnbiasError, match="must be a folder, got the file"):
        call(*train_words(tmp_path / "a.npz", tmp_path / "c.npz", "--model=vit"))
    assert not out.exists()
    call(*train_words(tmp_path / "a.npz", out, "--model=vit", "--steps=1"))
    with pytest.raises(AttnbiasError, match=r"wants images of 1 x 6 x 8 .* got 1 x 8 x 8"):
        call("predict", str(out), "--data=digits", f"--out={table}")
    np.savez(tmp_path / "d.npz", images=np.zeros((1, 6, 8)), labels=np.array(["dots"]))
    with pytest.raises(AttnbiasError, match="'dots' is none of the model's"):
        call("predict", str(out), f"--data={tmp_path / 'd.npz'}", f"--out={table}")
    with pytest.raises(AttnbiasError, match="does not exist"):
        call("predict", str(out), f"--data={tmp_path / 'a.npz'}", f"--out={table / 'y.csv'}")
    with pytest.raises(AttnbiasError, match="no model that can be read"):
        call("predict", str(tmp_path), f"--data={tmp_path / 'a.npz'}", f"--out={table}")
    assert not table.exists()
