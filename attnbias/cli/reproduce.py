"""`attnbias reproduce`: a work's protocol on your model and data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnbias.cli.loading import add_loading
from attnbias.errors import AttnbiasError


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "reproduce", help="the protocol of a work on your model and data, beside a control"
    )
    parser.add_argument("work", metavar="ID", help='a work, or "list" for those with a protocol')
    parser.add_argument("--model", metavar="M", help="a folder, or a name on the model hub")
    parser.add_argument("--data", type=Path, metavar="D", help="JSON lines; `list` says what kind")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: ID.json")
    parser.add_argument("--recipe", metavar="FILE", help="rules instead of the published ones")
    parser.add_argument("--limit", type=_count, metavar="N", help="only the first N items")
    parser.add_argument(
        "--max-new-tokens", type=_count, default=32, metavar="N", help="default: 32"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--fresh", action="store_true", help="forget what a stopped run has done")
    add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write one JSON file, print a summary; returns 0, or 130 when interrupted."""
    from attnbias.protocols import KINDS, protocol, read, reproduce

    if args.work == "list":
        return listing()
    found = protocol(args.work)
    kind = KINDS[found.kind]
    if args.model is None or args.data is None:
        missing = "--model" if args.model is None else "--data"
        raise AttnbiasError(
            f"{missing} is missing: attnbias reproduce {args.work} --model M --data D, where a line"
            f" of D is such as {kind.example}"
        )
    from attnbias.report.files import check_targets, write_all

    out = args.out or Path(f"{args.work}.json")
    journal = out.with_name(out.name + ".part")
    check_targets([out, journal])
    items = read(args.data, kind.fields, kind.example, args.limit)
    rules: tuple[Any, ...] = ()
    if args.recipe is not None:
        from attnbias.steer import Recipe

        rules = found.check(Recipe.load(args.recipe).rules)
    from attnbias.cli import loading

    model, processor, identity = loading.load_for(
        kind.loads, args.model, device=args.device, dtype=args.dtype, revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    import json

    try:
        with bar(args.work, len(items.items)) as tick:
            result = reproduce(
                found, model, processor, items, name=args.model, identity=identity, rules=rules,
                seed=args.seed, new_tokens=args.max_new_tokens, journal=journal, fresh=args.fresh,
                tick=tick,
            )  # fmt: skip
    except KeyboardInterrupt:
        print("attnbias: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    result["command"] = command(args)
    write_all({out: (json.dumps(result, indent=1, allow_nan=False) + "\n").encode()})
    journal.unlink(missing_ok=True)
    tell(result, out)
    return 0


def command(args: argparse.Namespace) -> str:
    """The command that measures this again."""
    words = ["attnbias reproduce", args.work, "--model", args.model, "--data", args.data.name]
    defaults = {"limit": None, "max_new_tokens": 32, "seed": 0, "dtype": "auto", "device": "cpu"}
    for name, usual in {**defaults, "recipe": None, "revision": None}.items():
        if getattr(args, name) != usual:
            words += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    return " ".join(words)


def listing() -> int:
    """Print the works with a protocol, what each measures and the data that it reads."""
    from attnbias.protocols import KINDS, PROTOCOLS

    for name, one in PROTOCOLS.items():
        kind = KINDS[one.kind]
        print(f"{name}  ({one.kind}, {one.score}, {one.better} is better)")
        print(f"    {one.effect}")
        print(f"    control: {one.control_says}")
        print(f"    cell:    {one.cell.where}; {one.cell.model}; {one.cell.data}")
        print(f"    data:    {kind.says}: {kind.example}")
    return 0


def tell(result: dict[str, Any], out: Path) -> None:
    """Print the means, the gains and what they may be called."""
    print(f"{result['work']}: {result['score']}, {result['better']} is better")
    for name, scores in result["arms"].items():
        one = scores[result["score"]]
        print(f"  {name:<8} {one['mean']:.4g}{_pm(one)}")
    for name, gain in result["gain"].items():
        print(f"  gain {name:<12} {gain['mean']:+.4g}{_pm(gain)}")
    cell = result["cell"]
    print(f"  the work: {cell['where']} ({cell['model']}; {cell['data']})")
    if result["mark"] == "reproduced":
        print(
            f"  reproduced: {result['arms']['rule'][cell['score']]['mean']:.4g} of {cell['rule']}"
        )
    else:
        other = [name for name, same in result["same as the cell"].items() if not same]
        print(f"  measured, not a reproduction: another {', '.join(other)} than the cell's")
    print(f"written: {out}")


def _pm(one: dict[str, float]) -> str:
    return f" ± {one['error']:.2g}, {one['count']} items" if "error" in one else ""


@contextmanager
def bar(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """Progress on standard error: a bar where it is a terminal, otherwise nothing."""
    if not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total, text="")

        def tick(text: str) -> None:
            progress.update(task, advance=float(text.startswith("item")), text=text)

        yield tick


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


_count.__name__ = "whole number from 1"  # argparse puts the name in its message
