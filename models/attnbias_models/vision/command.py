"""`attnbias-models vision`: train a classifier of images, and label images with it.

A model class is offered here when its name is in `CLASSIFIERS` and its `Config` has a classmethod
`small(size, channels, classes)`, which gives a model of a sensible size for small images; every
other field of the config can be set by `--set NAME=VALUE`.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnbias.errors import AttnbiasError
from attnbias_models import store
from attnbias_models.console import may_be_folder, writable
from attnbias_models.training import Plan, seeded, train
from attnbias_models.vision import brain_command
from attnbias_models.vision.convit import ConViT
from attnbias_models.vision.data import Split, split
from attnbias_models.vision.pictures import read
from attnbias_models.vision.task import ClassifyTask, logits, score
from attnbias_models.vision.vit import PatchClassifier

CLASSIFIERS = ("vit", "convit", "davit", "vitdet")
FIXED = ("size", "channels", "classes")


def add(subparsers: Any) -> None:
    """The parsers of `vision train` and `vision predict`."""
    top = subparsers.add_parser("vision", help="classify images: ViT, ConViT, DaViT, ViTDet")
    commands = top.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = commands.add_parser("train", help="train on labelled images; the same command resumes")
    one.add_argument("--model", required=True, choices=CLASSIFIERS)
    one.add_argument(
        "--data",
        required=True,
        help="'digits', a folder with a subfolder of pictures for each class, or a .npz file",
    )
    one.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the model")
    one.add_argument("--share", type=float, default=1.0, help="part of the training images used")
    one.add_argument("--steps", type=int, default=1000)
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--learning-rate", type=float, default=3e-3)
    one.add_argument("--weight-decay", type=float, default=0.05)
    one.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    one.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order")
    one.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of the model's config, as depth=4; may be given several times",
    )
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    one.set_defaults(run=train_command)
    two = commands.add_parser("predict", help="write a table of labels for images")
    two.add_argument("folder", type=Path, help="a folder written by `vision train`")
    two.add_argument("--data", required=True, help="as for train; labels are not needed")
    two.add_argument("--out", required=True, type=Path, help="CSV: image, label, probability")
    two.set_defaults(run=predict_command)
    brain_command.add(commands)


def run(args: argparse.Namespace) -> int:
    """Run what was asked for."""
    code: int = args.run(args)
    return code


def train_command(args: argparse.Namespace) -> int:
    """Train, save, print how well each part is classified."""
    may_be_folder(args.out)
    parts = split(read(args.data).labelled(), args.seed, share=args.share)
    made = configured(args.model, parts, args.set)
    model: nn.Module = seeded(lambda: store.model_class(args.model)(made), args.seed)
    task = ClassifyTask(
        parts.train, parts.valid, batch=args.batch, seed=args.seed, smoothing=args.smoothing
    )
    plan = Plan(
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        schedule="cosine",
        warmup=max(args.steps // 20, 1),
        validate_every=max(args.steps // 20, 1),
        seed=args.seed,
    )
    history = train(
        model,
        task,
        plan,
        folder=args.out,
        extra={
            "classes": list(parts.train.classes),
            "mean": parts.mean.tolist(),
            "std": parts.std.tolist(),
        },
        about={"images": _digest(parts), "batch": args.batch, "smoothing": args.smoothing},
        progress=not args.quiet,
        words=args.model,
    )
    _show(model, parts, history.best_step, history.seconds)
    return 0


def configured(name: str, parts: Split, settings: list[str]) -> Any:
    """The config of a model for these images, with `NAME=VALUE` settings."""
    kind = store.model_class(name).Config
    train_images = parts.train
    channels, height, width = train_images.images.shape[1:]
    config = kind.small((height, width), channels, len(train_images.classes))
    known = {field.name for field in dataclasses.fields(config)} - set(FIXED)
    given: dict[str, Any] = {}
    for text in settings:
        field, equals, value = text.partition("=")
        if not equals or field not in known:
            raise AttnbiasError(
                f"set must be NAME=VALUE with a name of {', '.join(sorted(known))}, got {text!r}."
            )
        given[field] = _value(field, value, getattr(config, field))
    return dataclasses.replace(config, **given)


def _value(field: str, text: str, now: Any) -> Any:
    """A setting as the type of what it replaces."""
    try:
        value = None if text.lower() == "none" else json.loads(text)
    except json.JSONDecodeError as error:
        raise AttnbiasError(
            f"{field} must be a number, true, false or none, got {text!r}."
        ) from error
    if isinstance(now, tuple) and isinstance(value, list):
        return tuple(value)
    whole = isinstance(now, int)
    if isinstance(now, bool) != isinstance(value, bool) or (whole and not isinstance(value, int)):
        raise AttnbiasError(f"{field} must be like {now}, got {text!r}.")
    return float(value) if isinstance(now, float) and value is not None else value


def predict_command(args: argparse.Namespace) -> int:
    """Label images; print the share of errors where the images have labels."""
    from rich.console import Console

    model, extra = store.load(args.folder)
    if not {"classes", "mean", "std"} <= set(extra):
        raise AttnbiasError(f"{args.folder} holds no classifier of images.")
    pictures = read(args.data)
    wanted = (model.config.channels, *model.config.size)
    if tuple(pictures.images.shape[1:]) != wanted:
        got = " x ".join(str(part) for part in pictures.images.shape[1:])
        raise AttnbiasError(
            f"the model wants images of {' x '.join(map(str, wanted))} (channels, height, width), "
            f"got {got}."
        )
    writable(args.out)
    classes = tuple(extra["classes"])
    labelled = None if pictures.labels is None else pictures.labelled(classes)
    mean, std = (torch.tensor(extra[name])[:, None, None] for name in ("mean", "std"))
    chances, found = logits(model, (pictures.images - mean) / std).softmax(1).max(1)
    lines = [
        (name, classes[number], f"{chance:.4f}")
        for name, number, chance in zip(
            pictures.names, found.tolist(), chances.tolist(), strict=True
        )
    ]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("image", "label", "probability"), *lines])

    store.replace(args.out, write)
    console = Console()
    console.print(f"{len(lines)} images: {args.out}")
    if labelled is not None:
        wrong = int((found != labelled.labels).sum())
        console.print(f"{wrong} of {len(lines)} differ from their labels")
    return 0


def _show(model: nn.Module, parts: Split, best: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    weights = sum(weight.numel() for weight in model.parameters())
    console.print(f"{weights} weights, best after {best} steps, {seconds:.0f} s")
    table = Table("images", "count", "cross-entropy", "errors")
    for name in ("train", "valid", "test"):
        images = getattr(parts, name)
        numbers = score(model, images)
        table.add_row(
            name, str(len(images)), f"{numbers['loss']:.3f}", f"{100 * numbers['error']:.1f} %"
        )
    console.print(table)
    if not isinstance(model, PatchClassifier):
        return
    far = model.distances(parts.valid.images[:256])
    gates = model.gates() if isinstance(model, ConViT) else torch.empty(0)
    layers = Table("layer", "looks (patches), by head", "positional share, by head")
    for number, row in enumerate(far):
        share = gates[number] if number < len(gates) else torch.empty(0)
        layers.add_row(str(number), *(" ".join(f"{x:.2f}" for x in part) for part in (row, share)))
    console.print(layers)


def _digest(parts: Split) -> str:
    """What names the data of a run: the same images, cut the same way."""
    found = hashlib.sha256()
    for images in (parts.train, parts.valid, parts.test):
        found.update(images.images.numpy().tobytes())
        found.update(images.labels.numpy().tobytes())
    return found.hexdigest()
