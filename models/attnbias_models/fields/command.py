"""`attnbias-models field`: train a neural process on a table or a process, and predict with it."""

from __future__ import annotations

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from attnbias.errors import AttnbiasError
from attnbias_models import store
from attnbias_models.console import may_be_folder, writable
from attnbias_models.fields import map as maps
from attnbias_models.fields import table
from attnbias_models.fields.table import Array, Columns

PROCESSES = ("gp1d", "gp2d", "sphere", "epidemics")
LEAST_STD = 0.01  # targets without noise have likelihoods without bound
BIASES = ("scalar", "rbf", "tisa", "exponential", "none")


def add(subparsers: Any) -> None:
    """The parsers of `field train` and `field predict`."""
    top = subparsers.add_parser("field", help="values over space and time: BSA-TNP")
    commands = top.add_subparsers(dest="action", metavar="ACTION", required=True)
    one = commands.add_parser("train", help="train; the same command resumes")
    source = one.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="a CSV file with a line of names")
    source.add_argument(
        "--process", choices=PROCESSES, help="fields drawn at random, for a model for any table"
    )
    _columns(one)
    one.add_argument("--target", help="column that is to be predicted")
    one.add_argument("--sphere", action="store_true", help="--space is latitude longitude, degrees")
    one.add_argument("--kind", choices=BIASES, help="of bias; the default goes with the data")
    one.add_argument("--out", required=True, type=Path, help="folder for checkpoints and the model")
    one.add_argument("--steps", type=int, default=1000)
    one.add_argument("--batch", type=int, default=8)
    one.add_argument("--most", type=int, default=256, help="rows of a table in a split")
    one.add_argument("--learning-rate", type=float, default=1e-3)
    one.add_argument("--blocks", type=int, default=6)
    one.add_argument("--spread", type=float, default=1.0, help="of the first bases, 1: all alike")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--quiet", action="store_true", help="no progress bar")
    one.set_defaults(run=train_command)
    two = commands.add_parser("predict", help="means and standard deviations at other places")
    two.add_argument("folder", type=Path, help="a folder written by `field train`")
    two.add_argument("--data", required=True, type=Path, help="CSV of what is known")
    _columns(two)
    two.add_argument("--target", help="column; by default that of the training")
    two.add_argument("--sphere", action="store_true", help=argparse.SUPPRESS)
    where = two.add_mutually_exclusive_group(required=True)
    where.add_argument("--at", type=Path, help="CSV of the places to predict at, columns as --data")
    where.add_argument("--grid", type=int, metavar="N", help="N places a side over the data's box")
    two.add_argument("--when", help="time of the grid, where the model has time")
    two.add_argument("--out", required=True, type=Path, help="CSV: places, mean, std")
    two.add_argument("--map", type=Path, help="PNG of means and standard deviations")
    two.add_argument("--chunk", type=int, default=16384, help="places at once")
    two.set_defaults(run=predict_command)


def run(args: argparse.Namespace) -> int:
    """Run what was asked for."""
    code: int = args.run(args)
    return code


def _columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--space", nargs="*", metavar="NAME", help="columns of coordinates")
    parser.add_argument("--time", metavar="NAME", help="column of times: numbers or dates")
    parser.add_argument("--effects", nargs="*", metavar="NAME", help="columns known everywhere")


def train_command(args: argparse.Namespace) -> int:
    """Train, save, print how good it is on what was kept apart."""
    may_be_folder(args.out)
    return _train_process(args) if args.data is None else _train_table(args)


def _train_table(args: argparse.Namespace) -> int:
    from attnbias_models.fields.estimator import FieldRegressor

    if args.target is None:
        raise AttnbiasError("--data needs --target, the column that is to be predicted.")
    names = Columns(tuple(args.space or ()), args.time, tuple(args.effects or ()), args.target)
    found = table.read(args.data, [*names.inputs, names.target], names.time)
    model = FieldRegressor(
        **names.places,
        sphere=args.sphere,
        kind=args.kind,
        steps=args.steps,
        learning_rate=args.learning_rate,
        batch=args.batch,
        most=args.most,
        blocks=args.blocks,
        spread=args.spread,
        out=args.out,
        seed=args.seed,
        progress=not args.quiet,
    )
    model.fit(found[:, :-1], found[:, -1])
    assert model.history_ is not None
    extra = {
        "scales": dataclasses.asdict(model.scales_),
        "columns": dataclasses.asdict(names),
        "sphere": args.sphere,
    }
    store.save(args.out, model.model_, extra)
    unit = math.log(model.scales_.value_unit)
    _show(
        [
            ("rows", f"{len(found):,}"),
            ("steps done", f"{len(model.history_.losses):,}"),
            ("best step", f"{model.history_.best_step:,}"),
            ("negative log-likelihood, rows kept apart", f"{model.history_.best + unit:.3f}"),
            ("the same of the table's mean and deviation", f"{0.5 + _HALF + unit:.3f}"),
            ("seconds", f"{model.history_.seconds:.1f}"),
        ]
    )
    return 0


_HALF = 0.5 * math.log(2 * math.pi)


def _train_process(args: argparse.Namespace) -> int:
    from attnbias_models.fields.model import BSATNP, BSATNPConfig
    from attnbias_models.fields.task import FieldTask
    from attnbias_models.training import Plan, seeded, train

    given = [n for n in ("space", "time", "effects", "target") if getattr(args, n) is not None]
    if given or args.sphere:
        named = ", ".join(f"--{name}" for name in [*given, *(["sphere"] if args.sphere else [])])
        raise AttnbiasError(f"a process has its own columns: leave out {named}.")
    generator, shape = _process(args.process, args.batch, args.seed)
    kind = args.kind or ("exponential" if args.process == "sphere" else "rbf")
    config = BSATNPConfig(
        **shape, kind=kind, blocks=args.blocks, spread=args.spread, least_std=LEAST_STD
    )
    if kind == "none":  # it would know of no places
        config = dataclasses.replace(config, coordinates=True)
    every = max(args.steps // 20, 1)
    plan = Plan(
        steps=args.steps,
        learning_rate=args.learning_rate,
        weight_decay=1e-4,
        schedule="cosine",
        warmup=every,
        clip=0.5,
        validate_every=every,
        save_every=every,
        seed=args.seed,
    )
    model: BSATNP = seeded(lambda: BSATNP(config), args.seed)
    history = train(
        model,
        FieldTask(generator),
        plan,
        folder=args.out,
        about={"process": args.process, "batch": args.batch},
        progress=not args.quiet,
        words=args.process,
    )
    _show(
        [
            ("process", args.process),
            ("steps done", f"{len(history.losses):,}"),
            ("best step", f"{history.best_step:,}"),
            ("negative log-likelihood, fields kept apart", f"{history.best:.3f}"),
            ("seconds", f"{history.seconds:.1f}"),
        ]
    )
    return 0


def _process(name: str, batch: int, seed: int) -> tuple[Any, dict[str, Any]]:
    """The generator of a name, and what a model of it has."""
    if name == "epidemics":
        from attnbias_models.fields.epidemics import Epidemics

        return Epidemics(batch_size=batch, seed=seed), {"space": 2, "time": True, "effects": 1}
    from attnbias_models.fields.processes import GaussianProcesses

    if name == "sphere":
        half = math.pi / 2
        made = GaussianProcesses("geodesic", 2, batch, (12, 64), seed=seed, low=-half, high=half)
        return made, {"space": 2}
    size = 1 if name == "gp1d" else 2
    context = (3, 50) if size == 1 else (12, 64)
    return GaussianProcesses("rbf", size, batch, context, seed=seed), {"space": size}


def predict_command(args: argparse.Namespace) -> int:
    """Predict at the places of a file or a grid; write a table and, if asked, a map."""
    from attnbias_models.fields.estimator import FieldRegressor

    for path in filter(None, (args.out, args.map)):
        writable(path)
    model, extra = store.load(args.folder)
    names = _named(args, extra)
    sphere = bool(extra.get("sphere", False)) or args.sphere or _round(model)
    found = table.read(args.data, [*names.inputs, names.target], names.time)
    if args.at is not None:
        asked = table.read(args.at, names.inputs, names.time)
    else:
        asked = _grid(args, names, found)
    regressor = FieldRegressor(**names.places, sphere=sphere, folder=args.folder, chunk=args.chunk)
    regressor.fit(found[:, :-1], found[:, -1])
    mean, std = regressor.predict(asked, return_std=True)
    _write(args.out, names, asked, mean, std)
    if args.map is not None:
        size = len(names.space) or 1
        on_map = (names.inputs if names.space else (str(names.time),))[:size]
        store.replace(
            args.map,
            lambda path: maps.draw(
                path,
                asked[:, :size],
                mean,
                std,
                known=found[:, :size],
                values=found[:, -1],
                names=on_map,
                target=names.target,
                sphere=sphere,
            ),
        )
    print(f"{len(asked):,} places: {args.out}" + (f", {args.map}" if args.map else ""))
    return 0


def _round(model: Any) -> bool:
    return bool(model.config.kind == "exponential" and model.config.space > 0)


def _named(args: argparse.Namespace, extra: dict[str, Any]) -> Columns:
    """Columns as given, else as in the training."""
    known = extra.get("columns", {})
    target = args.target or known.get("target")
    if target is None:
        raise AttnbiasError("this model was trained on no table: name --space or --time, --target.")
    space = known.get("space", ()) if args.space is None else args.space
    effects = known.get("effects", ()) if args.effects is None else args.effects
    return Columns(tuple(space), args.time or known.get("time"), tuple(effects), target)


def _grid(args: argparse.Namespace, names: Columns, found: Array) -> Array:
    if names.effects:
        raise AttnbiasError("a grid has no fixed effects: give the places with --at.")
    size = len(names.space) or 1
    if size > 2:
        raise AttnbiasError(f"a grid has one or two coordinates, not {size}: use --at.")
    places = maps.grid(found[:, :size].min(0), found[:, :size].max(0), args.grid)
    if not names.space or names.time is None:
        if args.when is not None:
            raise AttnbiasError("--when is for models of space and time.")
        return places
    if args.when is None:
        raise AttnbiasError(f"a grid of this model needs --when, a value of {names.time!r}.")
    when = _moment(args.when)
    return np.concatenate([places, np.full((len(places), 1), when)], 1)


def _moment(text: str) -> float:
    import pandas as pd

    try:
        return float(text)
    except ValueError:
        found = pd.to_datetime(text, errors="coerce", utc=True)
        if found is pd.NaT:
            raise AttnbiasError(
                f"--when takes a number or an ISO 8601 date, got {text!r}."
            ) from None
        return float((found - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1))


def _write(path: Path, names: Columns, asked: Array, mean: Array, std: Array) -> None:
    import pandas as pd

    made = pd.DataFrame(asked, columns=list(names.inputs))
    made["mean"], made["std"] = mean, std
    store.replace(path, lambda place: made.to_csv(place, index=False))


def _show(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
