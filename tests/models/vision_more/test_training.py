"""Each model learns, goes on where it stopped, is saved, predicts; recorded grids hold."""

from __future__ import annotations

import argparse
import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnbias.errors import AttnbiasError
from attnbias_models import store
from attnbias_models.training import Interrupted, Plan, seeded, train
from attnbias_models.vision import command
from attnbias_models.vision.brain import BrainEncoder
from attnbias_models.vision.data import digits, split
from attnbias_models.vision.davit import DaViT, DaViTConfig
from attnbias_models.vision.responses import EncodeTask, predicted
from attnbias_models.vision.simulated import FarCorner, moving_voxels
from attnbias_models.vision.task import ClassifyTask
from attnbias_models.vision.vitdet import ViTDet
from experiments.models import brain_encoder, davit, vitdet
from tests.models.reduced import check

PLAN = Plan(steps=60, learning_rate=5e-3, schedule="cosine", clip=1.0, validate_every=20)
Made = tuple[Callable[[int], nn.Module], Any, Tensor]


def digit_classifier() -> Made:
    parts = split(digits(), 0, share=0.3)
    config = DaViTConfig.small((8, 8), 1, 10)
    task = ClassifyTask(parts.train, parts.valid, batch=32)
    return lambda seed: seeded(lambda: DaViT(config), seed), task, parts.test.images


def corner_reader() -> Made:
    task = FarCorner(8, batch=16)
    images, _ = task.draw(8, "new")
    return lambda seed: seeded(lambda: ViTDet(vitdet.small("whole", 8)), seed), task, images


def encoder() -> Made:
    data, _ = moving_voxels(600, 0)
    parts = data.split(0)
    config = brain_encoder.small("attention", data)
    task = EncodeTask(parts[0], parts[1], batch=64)
    return lambda seed: seeded(lambda: BrainEncoder(config), seed), task, parts[2].features


@pytest.mark.parametrize(
    ("made", "rate", "warmup", "factor"),
    [
        (digit_classifier, 5e-3, 20, 0.8),
        (corner_reader, 1e-2, 10, 0.3),
        (encoder, 1e-2, 10, 0.8),
    ],
)
def test_the_loss_falls_and_an_interrupted_run_ends_the_same(
    made: Callable[[], Made], rate: float, warmup: int, factor: float, tmp_path: Path
) -> None:
    fresh, task, inputs = made()
    plan = dataclasses.replace(PLAN, learning_rate=rate, warmup=warmup)
    whole = fresh(0)
    plain = train(whole, task, plan, progress=False)
    assert sum(plain.losses[-10:]) < factor * sum(plain.losses[:10])
    with pytest.raises(Interrupted):
        train(fresh(0), task, plan, folder=tmp_path, progress=False, stop_after=33)
    torch.rand(3)  # whatever was drawn between
    again = fresh(1)
    resumed = train(again, task, plan, folder=tmp_path, progress=False)
    assert resumed.losses == plain.losses
    assert resumed.validations == plain.validations
    loaded, _ = store.load(tmp_path)
    assert type(loaded) is type(whole)
    assert loaded.config == whole.config
    with torch.no_grad():
        want = whole(inputs)
        assert torch.equal(again(inputs), want)
        assert torch.equal(loaded(inputs), want)


def test_a_trained_encoder_explains_more_than_its_controls() -> None:
    found = {
        route: brain_encoder.fitted(route, 1e-2, 0, 100, moving=True, images=1200)
        for route in ("attention", "static", "ridge")
    }
    assert found["attention"]["r2"] > 0.4
    assert found["attention"]["hits"] > 0.9
    assert found["static"]["r2"] < 0.05
    assert found["ridge"]["r2"] < 0.05


@pytest.mark.parametrize("module", [davit, vitdet, brain_encoder], ids=lambda m: m.GRIDS[0].name)
def test_the_recorded_row_is_met_again(module: Any) -> None:
    check(module.GRIDS[0])


def call(*words: str) -> int:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    code: int = command.run(parser.parse_args(["vision", *words]))
    return code


@pytest.mark.parametrize("name", ["davit", "vitdet"])
def test_classifiers_are_trained_by_the_command(name: str, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 120, (40, 9, 8)).astype(np.uint8)
    images[::2, ::2] += 100
    images[1::2, :, ::2] += 100
    np.savez(tmp_path / "a.npz", images=images, labels=np.array(["across", "down"] * 20))
    words = ("--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "out"))
    more = ("--steps=20", "--batch=8", "--learning-rate=1e-2", "--quiet")
    assert call("train", "--model", name, *words, *more) == 0
    table = tmp_path / "labels.csv"
    assert call("predict", str(tmp_path / "out"), *words[:2], f"--out={table}") == 0
    with table.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert sum(row["label"] == ("across", "down")[n % 2] for n, row in enumerate(rows)) >= 34


@pytest.mark.parametrize("route", ["attention", "linear"])
def test_an_encoder_is_trained_by_the_command(
    route: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, _ = moving_voxels(150, 0)
    areas = np.repeat([7, 1, 5, 3], 8)  # voxels come in the order of the numbers of their areas
    arrays = {"features": data.features.numpy(), "responses": data.responses.numpy()}
    np.savez(tmp_path / "a.npz", **arrays, areas=areas)
    given, out, answers = str(tmp_path / "a.npz"), tmp_path / "out", tmp_path / "answers.npz"
    sizes = ("--width=32", "--heads=2", "--hidden=32", "--steps=30", "--learning-rate=1e-2")
    words = ("encode", "--data", given, "--out", str(out), "--quiet", f"--route={route}", *sizes)
    assert call(*words) == 0
    assert "R^2 on images kept apart" in capsys.readouterr().out
    weights = (out / "model.safetensors").read_bytes()
    assert call(*words) == 0  # finished: nothing more to do
    assert (out / "model.safetensors").read_bytes() == weights
    assert call("respond", str(out), "--data", given, f"--out={answers}") == 0
    model, _ = store.load(out)
    with np.load(answers) as file:
        found = torch.from_numpy(file["responses"])
        assert torch.allclose(found, predicted(model, data.features), atol=1e-5)
        assert ("maps" in file) is (route == "attention")
        if route == "attention":
            assert file["maps"].shape == (150, 4, 8, 8)
            assert np.allclose(file["maps"].sum((2, 3)), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--data=nowhere.npz",), "no .npz file"),
        (("--heads=3",), "multiple of heads"),
        (("--steps=0",), "steps must be at least 1"),
        (("--width=30",), "width must be a multiple of 4"),
        (("--batch=0",), "batch must be at least 1"),
    ],
)
def test_what_cannot_be_encoded_writes_nothing(
    more: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(AttnbiasError, match=words):
        call("encode", "--data=simulated", f"--out={out}", "--quiet", "--heads=2", *more)
    assert not out.exists()


def test_what_cannot_be_predicted_writes_nothing(tmp_path: Path) -> None:
    store.save(tmp_path / "digits", DaViT(DaViTConfig.small((8, 8), 1, 10)))
    data, _ = moving_voxels(20, 0)
    store.save(tmp_path / "brain", BrainEncoder(brain_encoder.small("linear", data)))
    np.savez(tmp_path / "a.npz", features=data.features[:, :3].numpy())
    np.savez(tmp_path / "b.npz", features=data.features.numpy())
    answers = tmp_path / "answers.npz"
    for folder, name, place, words in (
        ("digits", "b", answers, "holds no brain encoder"),
        ("brain", "a", answers, r"must have shape \(batch, 16, 8, 8\)"),
        ("brain", "b", tmp_path / "nowhere" / "x.npz", "does not exist"),
    ):
        given = ("respond", str(tmp_path / folder), f"--data={tmp_path}/{name}.npz")
        with pytest.raises(AttnbiasError, match=words):
            call(*given, f"--out={place}")
    assert not answers.exists()
    assert call(*given, f"--out={answers}") == 0
    with np.load(answers) as file:
        assert set(file) == {"responses"}  # a linear model has no maps
