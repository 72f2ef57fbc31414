"""`attnbias bench`: one attention timed on every lowering; with --calibrate, the table of costs."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from attnbias.cli import explain
from attnbias.cli.problems import Case
from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    import torch


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "bench",
        help="time an attention on every lowering, or measure the costs the planner chooses by",
    )
    explain.options(parser, queries=False)
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="measure the table of costs of this machine instead; may be interrupted and continued",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="of the table, default: where the planner looks for it; what was measured lies beside "
        "it as .jsonl",
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=8.5, help="for the calibration, default: 8.5"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget what an earlier calibration measured"
    )


def run(args: argparse.Namespace) -> int:
    """Print the times, or write the table; returns 0, or 130 when a calibration is interrupted."""
    if args.calibrate:
        return calibrate(args)
    if args.queries is None:
        raise AttnbiasError("bench needs --queries, or --calibrate (see `attnbias bench --help`)")
    if args.out is not None or args.fresh:
        raise AttnbiasError("--out and --fresh go with --calibrate")
    print(times(args))
    return 0


def times(args: argparse.Namespace) -> str:
    """A table of one problem: what each lowering takes, and what the planner expected."""
    import attnbias as ab
    from attnbias.cli import calibration
    from attnbias.lowering.planner import time_text

    query, key, value, bias = explain.problem(args, fill=True)
    plan = ab.explain(query, key, value, bias=bias, causal=args.causal)
    direction = "learned" if args.learned else "training" if args.train else "forward"
    batch, heads, queries, size = query.shape
    case = Case(
        (args.bias,),
        batch,
        heads,
        key.shape[1],
        queries,
        key.shape[2],
        size,
        args.dtype,
        args.causal,
        direction,
    )
    lines = calibration.calls(case, query, key, value, bias)
    if bias is not None:
        fixed = "forward" if direction == "forward" else "training"
        plain = dataclasses.replace(case, direction=fixed)
        floor = calibration.calls(plain, query, key, value, None)
        lines["no bias"] = floor["sdpa"]
    taken = calibration.turns(lines, query.device, budget=5.0)
    fastest = min(t for name, t in taken.items() if name != "no bias")
    rows = [["", "lowering", "took", "over no bias", "over the fastest", "the planner expected"]]
    base = taken.get("no bias", taken.get("sdpa", fastest))
    told = {offer.lowering: offer for offer in plan.offers}
    for name, took in sorted(taken.items(), key=lambda item: item[1]):
        offer = told.get(name)
        guess = ""
        if offer is not None:
            guess = time_text(offer.seconds) if offer.seconds else f"{offer.time:.2f} x"
        row = ["->" if name == plan.chosen else "", name, time_text(took), f"{took / base:.2f} x"]
        rows.append([*row, "" if offer is None else f"{took / fastest:.2f} x", guess])
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    text = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    given = ["query, key and value"] * args.train + ["what the bias stores"] * args.learned
    what = f"forward and backward, to {' and '.join(given)}" if given else "forward"
    note = f"medians; {what}; -> is what the planner chose ({plan.source})"
    return "\n".join([plan.problem, "", *text, "", note])


def calibrate(args: argparse.Namespace) -> int:
    """Measure what is missing, fit, write the table; returns 0, or 130 when interrupted: what was
    measured is kept.
    """
    from attnbias import native
    from attnbias.cli import calibration
    from attnbias.lowering import costs

    device = _device(args.device)
    if device.type == "cpu" and not native.available():
        raise AttnbiasError(
            "the table of costs is of the compiled loops, and they are not there: "
            "pip install 'attnbias[native]'"
        )
    out = costs.user_path() if args.out is None else args.out
    kept = out.with_suffix(".jsonl")
    kind = costs.device_kind(device)
    others = [one for one in calibration.tables(out) if one["device"] != kind]
    before = calibration.measured(kept)
    if args.fresh:
        before = [record for record in before if record["device"] != kind]
    # Whole lines only: an interrupted run may have left half of one.
    calibration.replace(kept, "".join(json.dumps(record) + "\n" for record in before))
    done = {json.dumps(record["case"]) for record in before if record["device"] == kind}
    whole = calibration.cases()
    todo = [case for case in whole if json.dumps(_plain(case)) not in done]
    try:
        with kept.open("a", encoding="utf-8") as file, _progress(len(todo)) as advance:
            for record in calibration.measure(todo, device, args.minutes):
                file.write(json.dumps(record) + "\n")
                file.flush()
                advance(", ".join(record["case"]["structures"]) or "no bias")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    records = [one for one in calibration.measured(kept) if one["device"] == kind]
    if not records:
        raise AttnbiasError("nothing was measured: give the calibration more --minutes")
    table = calibration.table(device, records)
    calibration.write(out, [*others, table])
    print(f"{len(records)} of {len(whole)} problems measured on {table['measured']}: {out}")
    for name, gap in table["deviation"].items():
        print(f"  {name}: half of the fitted times within {gap:.0%} of the measured ones")
    if out != costs.user_path():
        print(f"The planner takes this table where ATTNBIAS_COSTS={out} is set.")
    return 0


def _plain(case: Case) -> dict[str, object]:
    """A case as it comes back from JSON."""
    found: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(case)))
    return found


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise AttnbiasError(f"--device {name!r} cannot be used here: {first}") from error
    return device


def _minutes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < 1e4:
        raise argparse.ArgumentTypeError(f"expected minutes above 0, got {text!r}")
    return number


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on standard error where rich is installed, else a line for each tenth."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn
    except ImportError:
        done = 0

        def tell(text: str) -> None:
            nonlocal done
            done += 1
            if done * 10 // max(total, 1) > (done - 1) * 10 // max(total, 1):
                print(f"{done} of {total}: {text}", file=sys.stderr, flush=True)

        yield tell
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("measuring", total=total)

        def advance(text: str) -> None:
            bar.update(task, advance=1, description=text)

        yield advance
