"""`attnbias-models vision encode` and `respond`: a brain encoder on one's own recordings."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attnbias.errors import AttnbiasError
from attnbias_models import store
from attnbias_models.console import may_be_folder, writable
from attnbias_models.training import Plan, seeded, train
from attnbias_models.vision.brain import ROUTES, BrainEncoder, BrainEncoderConfig
from attnbias_models.vision.responses import (
    EncodeTask,
    Responses,
    explained,
    predicted,
    read,
    read_features,
)
from attnbias_models.vision.simulated import moving_voxels


def add(commands: Any) -> None:
    """The parsers, as actions of `vision`."""
    one = commands.add_parser("encode", help="train an encoder of brain responses; resumes")
    one.add_argument(
        "--data",
        required=True,
        help="'simulated', or a .npz file: features (images, channels, height, width), responses "
        "(images, voxels), areas (voxels)",
    )
    one.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the model")
    one.add_argument("--route", choices=ROUTES, default="attention")
    one.add_argument("--width", type=int, help="features inside; default: the channels")
    one.add_argument("--heads", type=int, default=16)
    one.add_argument("--hidden", type=int, default=1024, help="of the feed-forward block")
    one.add_argument("--dropout", type=float, default=0.1)
    one.add_argument("--steps", type=int, default=2000)
    one.add_argument("--batch", type=int, default=16)
    one.add_argument("--learning-rate", type=float, default=5e-4)
    one.add_argument("--weight-decay", type=float, default=1e-4)
    one.add_argument("--seed", type=int, default=0, help="of the split, the weights and the order")
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    one.set_defaults(run=encode)
    two = commands.add_parser("respond", help="predict responses, and where each area looks")
    two.add_argument("folder", type=Path, help="a folder written by `vision encode`")
    two.add_argument("--data", required=True, type=Path, help=".npz with features")
    two.add_argument("--out", required=True, type=Path, help=".npz: responses, maps")
    two.set_defaults(run=respond)


def encode(args: argparse.Namespace) -> int:
    """Train, save, print how much of the variance is explained in each area."""
    may_be_folder(args.out)
    data = moving_voxels(2000, args.seed)[0] if args.data == "simulated" else read(args.data)
    parts = data.split(args.seed)
    _, channels, height, width = data.features.shape
    config = BrainEncoderConfig(
        areas=data.areas,
        channels=channels,
        grid=(height, width),
        width=args.width or channels,
        heads=args.heads,
        hidden=args.hidden,
        dropout=args.dropout,
        route=args.route,
    )
    model: BrainEncoder = seeded(lambda: BrainEncoder(config), args.seed)
    plan = Plan(
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        schedule="cosine",
        validate_every=max(args.steps // 20, 1),
        seed=args.seed,
    )
    history = train(
        model,
        EncodeTask(parts[0], parts[1], batch=args.batch, seed=args.seed),
        plan,
        folder=args.out,
        about={"data": _digest(data), "batch": args.batch},
        progress=not args.quiet,
        words=f"brain encoder ({args.route})",
    )
    _show(model, parts[2], history.best_step, history.seconds)
    return 0


def respond(args: argparse.Namespace) -> int:
    """Write predicted responses, and the maps where the encoder has them."""
    from rich.console import Console

    model, _ = store.load(args.folder)
    if not isinstance(model, BrainEncoder):
        raise AttnbiasError(f"{args.folder} holds no brain encoder.")
    writable(args.out)
    features = read_features(args.data)
    arrays = {"responses": predicted(model, features).numpy()}
    if model.config.route != "linear":
        with torch.no_grad():
            arrays["maps"] = model.maps(features).numpy()

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    store.replace(args.out, write)
    Console().print(f"{len(features)} images: {args.out}")
    return 0


def _show(model: BrainEncoder, test: Responses, best: int, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    weights = sum(weight.numel() for weight in model.parameters())
    console.print(f"{weights} weights, best after {best} steps, {seconds:.0f} s")
    found = explained(predicted(model, test.features), test.responses)
    table = Table("area", "voxels", "R^2 on images kept apart")
    for number, part in enumerate(found.split(test.areas)):  # type: ignore[no-untyped-call]
        table.add_row(str(number), str(len(part)), f"{float(part.mean()):.3f}")
    table.add_row("all", str(len(found)), f"{float(found.mean()):.3f}")
    console.print(table)


def _digest(data: Responses) -> str:
    """What names the data of a run."""
    found = hashlib.sha256()
    for tensor in (data.features, data.responses):
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()
