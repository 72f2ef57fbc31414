"""`attnbias observe`: where the attention of a model goes in a text, as a page, a figure, data."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbias.cli import corpus, texts
from attnbias.cli.loading import add_loading
from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    from attnbias.report.data import ReportData

OUTPUTS = ("report", "png", "csv", "json")


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser(
        "observe", help="where the attention of a model goes in a text, against two controls"
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a folder, a name on the model hub, or a report saved by --json",
    )
    parser.add_argument("--text", metavar="FILE", help='UTF-8 text, "-" for stdin')
    parser.add_argument("--image", type=Path, metavar="FILE", help="an image, alone or with a text")
    parser.add_argument("--report", type=Path, metavar="FILE", help="one self-contained HTML page")
    parser.add_argument("--png", type=Path, metavar="FILE", help="the main figure")
    parser.add_argument(
        "--csv", type=Path, metavar="FILE", help="a row for each head and statistic"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything on the page as data")
    parser.add_argument("--layers", default="all", help='as in 0,3-5; default: "all"')
    parser.add_argument("--max-tokens", type=int, metavar="N", help="cut the text after N tokens")
    texts.add(parser)
    corpus.add(parser)
    add_loading(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, write the files asked for (all or none), print the summary; returns 0."""
    if args.corpus is not None:
        texts.check_unused(args, "--corpus")
        return corpus.run(args)
    corpus.check_unused(args)
    if args.image is not None:
        texts.check_unused(args, "--image")
        from attnbias.cli import images

        return images.run(args, (("Command", command(args)),))
    return texts.run(args, (("Command", command(args)),))


def layer_numbers(text: str) -> str | tuple[int, ...]:
    """ "all", or layer numbers written as in ``0,3-5``."""
    if text == "all":
        return text
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise AttnbiasError(f'--layers {text!r}: write "all" or numbers as in 0,3-5')
        found.extend(range(int(first), int(last if dash else first) + 1))
    if not found or len(found) > 10_000:
        raise AttnbiasError(f'--layers {text!r}: write "all" or numbers as in 0,3-5')
    return tuple(dict.fromkeys(found))


def tell(data: ReportData, targets: dict[str, Path], other: ReportData | None = None) -> None:
    """Print the summary, what a second run changes, and the names of the files written."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from attnbias.report.page import clean
    from attnbias.report.summary import summarise

    console = Console(highlight=False)
    summary = summarise(clean(data))
    console.print(Text(summary.verdict, style="bold"))
    for one in summary.findings:
        lines = [
            one.statement, one.strongest, *one.controls, one.interval, one.reading, one.threshold,
        ]  # fmt: skip
        mark = Text("* " if one.strong else "- ")
        grid = Table.grid()
        grid.add_row(mark, Text("\n".join(line for line in lines if line)))
        console.print("", grid)
    if other is not None:
        from attnbias.report.compare import compared

        shown = [clean(data), clean(other)]
        told = compared(shown[0], shown[1], [summarise(one) for one in shown])
        console.print(Text(f"\nBeside the second run: {told.verdict}", style="bold"))
        for change in told.differences:
            if change.strong:
                console.print(Text(f"* {change.statement} {change.largest} {change.controls}"))
    console.print(Text(f"\n{summary.standing}", style="italic"))
    for path in targets.values():
        console.print(Text(f"written: {path}"))


def command(args: argparse.Namespace) -> str:
    """The command that gives this report again; outputs other than the page are left out."""
    words = ["attnbias", "observe", args.model]
    for flag in ("image", "text", "compare"):
        if getattr(args, flag, None) is not None:
            words += [f"--{flag}", Path(getattr(args, flag)).name]
    for flag in ("layers", "max_tokens", "device", "dtype", "revision"):
        value = getattr(args, flag)
        if value is not None and value not in ("all", "cpu", "auto"):
            words += [f"--{flag.replace('_', '-')}", str(value)]
    if args.trust_remote_code:
        words.append("--trust-remote-code")
    if args.report:
        words += ["--report", args.report.name]
    return shlex.join(words)


def _title(model: str) -> str:
    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    parts = path.resolve().parts
    # A folder's last name says little when it is "model".
    return "/".join(
        parts[-2:] if parts[-1].lower() in ("model", "hf", "checkpoint") else parts[-1:]
    )


def _where(model: Any) -> str:
    weight = next(model.parameters())
    return f"{str(weight.dtype).removeprefix('torch.')}, {weight.device.type}"
