"""`attnbias-models forecast`: train on a CSV file with a date column, and forecast it."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
from pathlib import Path
from typing import Any

from attnbias.errors import AttnbiasError
from attnbias_models import store
from attnbias_models.console import may_be_folder
from attnbias_models.forecasting.data import FRACTIONS, Series
from attnbias_models.forecasting.forecaster import MODELS, Forecaster, fit, recipe
from attnbias_models.forecasting.plot import check_format, plot_forecast
from attnbias_models.forecasting.scores import channel_scores
from attnbias_models.forecasting.seasonal import SeasonalConfig, SeasonalNaive, season
from attnbias_models.tables import read_table


def add(subparsers: Any) -> None:
    """Add `forecast train` and `forecast predict`."""
    family = subparsers.add_parser("forecast", help="forecast a table of dates and numbers")
    commands = family.add_subparsers(dest="what", metavar="train|predict", required=True)
    first = commands.add_parser("train", help="train a model on a CSV file")
    first.set_defaults(run=run)
    _add_data(first)
    first.add_argument("--model", default="penguin", help=f"{', '.join(MODELS)} (default: penguin)")
    first.add_argument("--horizon", type=int, required=True, help="rows to forecast")
    first.add_argument("--length", type=int, help="rows to read (default: the published number)")
    first.add_argument("--out", type=Path, required=True, help="folder of the model")
    first.add_argument("--columns", help="names of columns with commas between (default: all)")
    first.add_argument(
        "--split",
        default=",".join(map(str, FRACTIONS)),
        help="fractions or rows to train, validate, test (ETTh1: 8640,2880,2880)",
    )
    first.add_argument("--period", type=int, help="rows of a season of the naive forecast")
    first.add_argument("--epochs", type=int)
    first.add_argument("--batch", type=int)
    first.add_argument("--learning-rate", type=float)
    first.add_argument("--patience", type=int, help="epochs without a better validation")
    first.add_argument("--seed", type=int, default=0)
    first.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a value of the config"
    )
    first.add_argument("--quiet", action="store_true", help="no progress bar")
    second = commands.add_parser("predict", help="forecast what follows a CSV file")
    second.set_defaults(run=run)
    second.add_argument("folder", type=Path, help="folder of the model")
    _add_data(second)
    second.add_argument("--out", type=Path, required=True, help="CSV file of the forecast")
    second.add_argument("--plot", type=Path, help="picture of the forecast (.png, .svg, .pdf)")


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="CSV file with a date column")
    parser.add_argument("--date", help="name of the date column")
    parser.add_argument("--date-format", help="as strptime takes it (default: ISO 8601)")


def run(args: argparse.Namespace) -> int:
    """Run what was parsed."""
    return _train(args) if args.what == "train" else _predict(args)


def _train(args: argparse.Namespace) -> int:
    columns = None if args.columns is None else [part.strip() for part in args.columns.split(",")]
    table = read_table(args.data, date=args.date, date_format=args.date_format, columns=columns)
    series = Series.of(table, _split(args.split))
    names = ("epochs", "batch", "learning_rate", "patience")
    training = {name: value for name in names if (value := getattr(args, name)) is not None}
    for name in ("epochs", "patience"):
        if training.get(name, 1) < 1:
            raise AttnbiasError(f"{name} must be at least 1, got {training[name]}.")
    settings = _settings(recipe(args.model).kind.Config, args.set)
    length = recipe(args.model).length if args.length is None else args.length
    windows = series.test(length, args.horizon)
    period = min(season(table.step), length) if args.period is None else args.period
    naive = SeasonalNaive(SeasonalConfig(length, args.horizon, period))
    may_be_folder(args.out)
    forecaster, history = fit(
        series,
        args.model,
        horizon=args.horizon,
        length=length,
        folder=args.out,
        seed=args.seed,
        settings=settings,
        training=training,
        progress=not args.quiet,
    )
    rows = {}
    for name, model in ((args.model, forecaster.model), ("seasonal naive", naive)):
        squared, absolute = channel_scores(model, windows)
        own = (absolute * series.deviation).tolist()
        rows[name] = {
            "mse": float(squared.mean()),
            "mae": float(absolute.mean()),
            "mae_in_units": dict(zip(series.names, own, strict=True)),
        }
    result = {
        "windows": len(windows),
        "horizon": args.horizon,
        "length": length,
        "period": period,
        "steps": len(history.losses),
        "seconds": round(history.seconds, 1),
        "validation": history.best,
        "test": rows,
    }
    text = json.dumps(result, indent=1) + "\n"
    store.replace(args.out / "scores.json", lambda path: path.write_text(text, encoding="utf-8"))
    _show(result, str(args.data), args.out)
    return 0


def _show(result: dict[str, Any], data: str, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{data}: {result['windows']} test windows, horizon {result['horizon']}")
    table.add_column("model")
    names = list(next(iter(result["test"].values()))["mae_in_units"])
    for name in ("MSE", "MAE", *(f"MAE {name}" for name in names[:4])):
        table.add_column(name, justify="right")
    for name, row in result["test"].items():
        own = [f"{row['mae_in_units'][column]:.4g}" for column in names[:4]]
        table.add_row(name, f"{row['mse']:.4f}", f"{row['mae']:.4f}", *own)
    console = Console()
    console.print(table)
    console.print(
        f"MSE and MAE of z-scores, then in the table's units; the naive forecast repeats "
        f"{result['period']} rows. {result['steps']} steps in {result['seconds']} s: {out}",
        highlight=False,
        soft_wrap=True,
    )


def _predict(args: argparse.Namespace) -> int:
    if args.plot is not None:
        check_format(args.plot)
    for path in filter(None, (args.out, args.plot)):
        if path.is_dir():
            raise AttnbiasError(f"a file is to be written, {path} is a folder.")
    forecaster = Forecaster.load(args.folder)
    table = read_table(
        args.data,
        date=args.date or forecaster.date,
        date_format=args.date_format,
        columns=forecaster.names,
    )
    forecast = forecaster.forecast(table)
    forecast.write(args.out)
    if args.plot is not None:
        plot_forecast(args.plot, table, forecast)
    print(
        f"{len(forecast)} rows from {forecast.dates[0]} to {forecast.dates[-1]}: {args.out}"
        + (f", {args.plot}" if args.plot is not None else "")
    )
    return 0


def _split(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise AttnbiasError(
            f"split takes three numbers with commas between, got {text!r}."
        ) from None


def _settings(kind: Any, pairs: list[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs as values of a config, each of the kind of its default."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    shape = ("length", "horizon", "channels")
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known or name in shape:
            names = ", ".join(name for name in known if name not in shape)
            raise AttnbiasError(f"set takes NAME=VALUE with a name of {names}; got {pair!r}.")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        default = known[name].default
        if isinstance(default, tuple) and not isinstance(value, tuple):
            value = tuple(value) if isinstance(value, list) else (value,)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        known_kind = default is not None and default is not dataclasses.MISSING
        if known_kind and type(value) is not type(default):
            raise AttnbiasError(
                f"set {name} takes a value such as {default!r} ({type(default).__name__}), "
                f"got {text!r}."
            )
        found[name] = value
    return found
