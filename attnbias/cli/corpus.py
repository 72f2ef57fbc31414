"""`attnbias observe MODEL --corpus FILE --out DIR`: a corpus, in a folder that keeps the work."""

from __future__ import annotations

import argparse
import ast
import re
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnbias.errors import AttnbiasError

if TYPE_CHECKING:
    from attnbias.observe.corpus import CorpusTable
    from attnbias.observe.statistic import Statistic

FORMATS = ("csv", "parquet", "json")
TEXT_ONLY = ("text", "image", "report", "png", "csv", "json")
STOPPED = 130


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of a corpus to those of `attnbias observe`."""
    group = parser.add_argument_group("a corpus", "means over documents, with intervals")
    group.add_argument(
        "--corpus", type=Path, metavar="FILE",
        help='.jsonl with lines {"text": ...} or {"id": ..., "text": ...}, or .txt with empty '
        "lines between documents",
    )  # fmt: skip
    group.add_argument("--out", type=Path, metavar="DIR", help="the folder of the run; it goes on")
    group.add_argument(
        "--statistics", metavar="LIST",
        help="names, as in entropy,received[queries],sink_rate[0.3]; default: "
        "received[queries],entropy,first_token,sink_rate,distance",
    )  # fmt: skip
    group.add_argument(
        "--queries", type=int, metavar="K", help="sample K query rows of each call (default: all)"
    )
    group.add_argument("--seed", type=int, default=0, help="of the sampling; default: 0")
    group.add_argument(
        "--confidence", type=float, default=0.95, help="of the intervals; default: 0.95"
    )
    group.add_argument("--interval", choices=("t", "bootstrap"), default="t", help="default: t")
    group.add_argument(
        "--format", default="csv", metavar="LIST",
        help="of the table in the folder: csv, parquet, json; default: csv",
    )  # fmt: skip


def check_unused(args: argparse.Namespace) -> None:
    """One sentence for an option that only a corpus has, given without one."""
    usual = {"seed": 0, "confidence": 0.95, "interval": "t", "format": "csv"}
    for name in ("out", "statistics", "queries", *usual):
        if getattr(args, name) != usual.get(name):
            raise AttnbiasError(f"--{name} is for a corpus; give --corpus FILE --out DIR with it")


def run(args: argparse.Namespace) -> int:
    """Measure what is missing, write the table, print it; 0 done, 130 stopped.

    Under torchrun every process comes here; the first alone speaks and writes.
    """
    from attnbias.observe.corpus.processes import count_of

    first = not count_of("RANK")
    try:
        with _stopped_by_term():
            return _run(args, first)
    except AttnbiasError:
        if first:
            raise
        return 2
    except KeyboardInterrupt:
        if first:
            print(_where(args), file=sys.stderr)
        return STOPPED


def _run(args: argparse.Namespace, first: bool) -> int:
    from attnbias.cli import observe
    from attnbias.cli.loading import load
    from attnbias.observe import corpus
    from attnbias.observe.corpus.merge import check_interval
    from attnbias.observe.corpus.processes import count_of
    from attnbias.observe.parquet import need_pyarrow

    formats = checked(args)
    check_interval(args.confidence, args.interval)
    if "parquet" in formats:
        need_pyarrow()
    layers = observe.layer_numbers(args.layers)
    wanted = statistics(args.statistics)
    documents = corpus.read(args.corpus)
    local = count_of("LOCAL_RANK")
    device = args.device if args.device != "cuda" or local is None else f"cuda:{local}"
    model, tokenizer, identity = load(
        args.model, device=device, dtype=args.dtype, revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )  # fmt: skip
    table = corpus.run(
        model, tokenizer, documents, corpus.DEFAULT if wanted is None else wanted, out=args.out,
        layers=layers, max_tokens=args.max_tokens, queries=args.queries, seed=args.seed,
        name=observe._title(args.model), identity=identity, confidence=args.confidence,
        interval=args.interval, progress=first and sys.stderr.isatty(),
        say=lambda words: print(words, file=sys.stderr, flush=True),
    )  # fmt: skip
    if table is not None:
        tell(table, args.out, formats)
    return 0


def checked(args: argparse.Namespace) -> list[str]:
    """The formats; one sentence for options that do not go together."""
    if args.out is None:
        raise AttnbiasError("--corpus needs --out DIR, the folder that keeps what is done")
    for name in TEXT_ONLY:
        if getattr(args, name, None) is not None:
            raise AttnbiasError(
                f"--{name} is for one text or image; with --corpus the table is written to --out"
            )
    formats = list(dict.fromkeys(part.strip() for part in args.format.split(",")))
    unknown = [word for word in formats if word not in FORMATS]
    if unknown:
        raise AttnbiasError(f"--format {args.format!r}: write some of {', '.join(FORMATS)}")
    return formats


def statistics(text: str | None) -> list[Statistic] | None:
    """Statistics from their labels: ``entropy,received[queries],sink_rate[0.3, 5]``."""
    if text is None:
        return None
    from attnbias.observe.registry import by_name

    found = []
    for word in re.split(r",(?![^\[]*\])", text):
        match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\[(.*)\])?\s*", word)
        if match is None:
            raise AttnbiasError(
                f"--statistics {text!r}: write names as in entropy,received[queries]"
            )
        kind = by_name(match[1])
        try:
            found.append(kind(*(_literal(part) for part in (match[2] or "").split(",") if part)))
        except TypeError as error:
            raise AttnbiasError(f"--statistics {word.strip()!r}: {error}") from None
    return found


def tell(table: CorpusTable, out: Path, formats: list[str]) -> None:
    """Write the table in the formats asked for, print it and the names of the files."""
    from rich.console import Console
    from rich.text import Text

    paths = [out / f"table.{word}" for word in formats]
    for path in paths:
        table.save(path)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(str(table)))
    for path in paths:
        console.print(Text(f"written: {path}"))


def _where(args: argparse.Namespace) -> str:
    """What to say when the run was stopped."""
    done = ""
    try:
        from attnbias.observe.corpus.folder import opened

        folder = opened(args.out)
        whole = folder.settings["corpus"]["documents"]
        done = f" after {len(folder.index())} of {whole} documents"
    except (AttnbiasError, TypeError):
        pass
    again = "" if args.out is None else f" (--out {shlex.quote(str(args.out))})"
    return f"attnbias: stopped{done}; the same command goes on from here{again}"


@contextmanager
def _stopped_by_term() -> Iterator[None]:
    """SIGTERM, by which `torchrun` and job schedulers stop a process, is as Ctrl-C here."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: nobody may set one there
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()
