"""`attnbias-models solver`: make clouds, train a solver on clouds, solve on new ones."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import statistics
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from attnbias.errors import AttnbiasError
from attnbias_models import store
from attnbias_models.console import at_least, may_be_folder, show_table, writable
from attnbias_models.solver.data import Cloud, Columns, read_clouds, split
from attnbias_models.solver.model import BIASES, NeuralSolver, SolverConfig
from attnbias_models.solver.task import CloudTask, error, relative
from attnbias_models.training import Plan, seeded, train

GENERATED = Columns(("x", "y"), ("log_a", "f", "edge"), ("u",), "case")


def add(subparsers: Any) -> None:
    """The family's commands."""
    family = subparsers.add_parser("solver", help="solve equations on clouds of points")
    commands = family.add_subparsers(dest="solver_command", metavar="COMMAND", required=True)
    made = commands.add_parser("make", help="write clouds of a flow, solved by finite elements")
    made.add_argument("--out", type=Path, required=True, help="the CSV file")
    _generated(made, clouds=20)
    made.set_defaults(run=make)

    trained = commands.add_parser("train", help="train on clouds of a CSV file, or generated ones")
    trained.add_argument("--out", type=Path, required=True, help="folder of the model")
    trained.add_argument("--data", type=Path, help="CSV file, a row for each point; else generated")
    trained.add_argument("--case", help="column that tells one cloud from another")
    trained.add_argument("--at", nargs="+", help="columns of coordinates")
    trained.add_argument("--inputs", nargs="*", help="columns known at each point")
    trained.add_argument("--targets", nargs="+", help="columns of the solution")
    _generated(trained, clouds=200)
    trained.add_argument("--bias", choices=BIASES, default="query")
    for name, value in (("width", 64), ("heads", 4), ("layers", 4)):
        trained.add_argument(f"--{name}", type=int, default=value)
    trained.add_argument("--steps", type=int, default=1000)
    trained.add_argument("--batch", type=int, default=4, help="clouds of a step")
    trained.add_argument("--subset", type=int, help="points of a cloud that a step sees")
    trained.add_argument("--learning-rate", type=float, default=2e-3)
    trained.set_defaults(run=fit)

    solved = commands.add_parser("predict", help="solve on the clouds of a CSV file")
    solved.add_argument("folder", type=Path, help="folder of a trained model")
    solved.add_argument("--data", type=Path, required=True)
    solved.add_argument("--out", type=Path, required=True, help="the CSV file")
    solved.add_argument("--plot", type=Path, help="a picture of the first cloud (PNG)")
    solved.set_defaults(run=predict)


def run(args: argparse.Namespace) -> int:
    """Run the command that was named."""
    code: int = args.run(args)
    return code


def make(args: argparse.Namespace) -> int:
    """Write generated clouds as a table."""
    writable(args.out)
    clouds = _darcy(args).clouds(at_least(1, "clouds", args.clouds))
    rows = []
    for number, cloud in enumerate(clouds):
        values = torch.cat([cloud.points, cloud.inputs, cloud.outputs], 1).numpy()
        names = [*GENERATED.at, *GENERATED.inputs, *GENERATED.targets]
        rows.append(pd.DataFrame(values, columns=names).assign(case=number))
    table = pd.concat(rows)
    store.replace(args.out, lambda path: table.to_csv(path, index=False))
    print(f"{len(table)} points of {len(clouds)} clouds in {args.out}")
    return 0


def fit(args: argparse.Namespace) -> int:
    """Train, and print the table of errors on clouds kept apart."""
    may_be_folder(args.out)
    clouds, columns, about = _clouds(args)
    training, valid, test = split(clouds, args.seed)
    config = SolverConfig(
        coordinates=len(columns.at),
        inputs=len(columns.inputs),
        outputs=len(columns.targets),
        width=args.width,
        heads=args.heads,
        layers=args.layers,
        bias=args.bias,
    )
    model: NeuralSolver = seeded(lambda: NeuralSolver(config), args.seed).measure(training)
    at_least(1, "batch", args.batch)
    if args.subset is not None:
        at_least(8, "subset", args.subset)
    task = CloudTask(training, valid, args.batch, args.subset, args.seed)
    plan = Plan(
        steps=args.steps,
        learning_rate=args.learning_rate,
        schedule="cosine",
        warmup=min(20, args.steps),
        clip=1.0,
        validate_every=max(1, args.steps // 10),
        seed=args.seed,
    )
    history = train(
        model,
        task,
        plan,
        folder=args.out,
        extra={"columns": dataclasses.asdict(columns)},
        about={**about, "batch": args.batch, "subset": args.subset},
        words="solver",
    )
    mean = torch.cat([cloud.outputs for cloud in training]).mean(0)
    constant = statistics.mean(
        float(relative(mean.expand_as(cloud.outputs), cloud.outputs)) for cloud in test
    )
    rows = [
        ("clouds: training, validation, test", f"{len(training)}, {len(valid)}, {len(test)}"),
        ("steps, seconds", f"{len(history.losses)}, {history.seconds:.0f}"),
        ("validation error (best)", f"{history.best:.4f}"),
        ("test error", f"{error(model, test):.4f}"),
        ("test error of the mean solution", f"{constant:.4f}"),
    ]
    show_table(f"neural solver, bias {args.bias}: |found - wanted| / |wanted|", rows)
    print(f"the model is in {args.out}")
    return 0


def predict(args: argparse.Namespace) -> int:
    """Solve, write the table, and say the error where the table holds the solution."""
    for path in (args.out, args.plot):
        if path is not None:
            writable(path)
    model, extra = store.load(args.folder)
    if not isinstance(model, NeuralSolver):
        raise AttnbiasError(f"{args.folder} holds a {type(model).__name__}, not a NeuralSolver.")
    trained = {name: _names(value) for name, value in extra["columns"].items()}
    if args.plot is not None and len(trained["at"]) < 2:
        raise AttnbiasError("--plot needs points of at least 2 coordinates, got 1.")
    columns = Columns(**{**trained, **_there(args.data, trained)})
    clouds = read_clouds(args.data, columns)
    found = [model.predict(cloud) for cloud in clouds]
    table = pd.read_csv(args.data)
    for place, name in enumerate(trained["targets"]):
        table[f"{name}_predicted"] = torch.cat([values[:, place] for values in found]).numpy()
    store.replace(args.out, lambda path: table.to_csv(path, index=False))
    print(f"solved on {len(table)} points of {len(clouds)} clouds: {args.out}")
    if columns.targets:
        print(f"error: {error(model, clouds):.4f} (|found - wanted| / |wanted|)")
    if args.plot is not None:
        from attnbias_models.solver.plot import draw

        draw(clouds[0], found[0], args.plot, trained["targets"][0])
        print(f"picture: {args.plot}")
    return 0


def _generated(parser: argparse.ArgumentParser, clouds: int) -> None:
    parser.add_argument("--clouds", type=int, default=clouds, help="number of generated clouds")
    parser.add_argument("--points", type=int, default=1000, help="points of a generated cloud")
    parser.add_argument("--seed", type=int, default=0)


def _darcy(args: argparse.Namespace) -> Any:
    from attnbias_models.solver.darcy import Darcy

    return Darcy(points=args.points, seed=at_least(0, "seed", args.seed))


def _clouds(args: argparse.Namespace) -> tuple[list[Cloud], Columns, dict[str, Any]]:
    """Clouds, what their columns are, and what names the data."""
    given = [name for name in ("case", "at", "inputs", "targets") if getattr(args, name)]
    if args.data is None:
        if given:
            raise AttnbiasError(f"--{given[0]} names a column of --data, which is not given.")
        problem = _darcy(args)
        clouds = problem.clouds(at_least(4, "clouds", args.clouds))
        about = {"data": dataclasses.asdict(problem), "clouds": args.clouds}
        return clouds, GENERATED, about
    for name in ("case", "at", "targets"):
        if name not in given:
            raise AttnbiasError(f"--data needs --{name}: names of columns of {args.data}.")
    columns = Columns(tuple(args.at), tuple(args.inputs or ()), tuple(args.targets), args.case)
    clouds = read_clouds(args.data, columns)
    digest = hashlib.sha256(args.data.read_bytes()).hexdigest()[:16]
    return clouds, columns, {"data": digest, "columns": dataclasses.asdict(columns)}


def _there(path: Path, trained: dict[str, Any]) -> dict[str, Any]:
    """The columns that a table to solve on may leave out."""
    try:
        names = set(pd.read_csv(path, nrows=0).columns)
    except (OSError, ValueError) as wrong:
        raise AttnbiasError(f"{path} is no table that can be read: {wrong}") from wrong
    known = set(trained["targets"]) <= names
    return {
        "targets": trained["targets"] if known else (),
        "case": trained["case"] if trained["case"] in names else None,
    }


def _names(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
