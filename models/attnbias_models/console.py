"""What the commands share: checks of what they are given, and tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnbias.errors import AttnbiasError


def at_least(least: int, name: str, value: int) -> int:
    """The value; AttnbiasError where it is smaller."""
    if value < least:
        raise AttnbiasError(f"{name} must be at least {least}, got {value}.")
    return value


def writable(path: Path) -> None:
    """AttnbiasError where a file cannot stand: without its folder, or in place of one."""
    if not path.parent.is_dir():
        raise AttnbiasError(f"the folder {path.parent} of {path.name} does not exist.")
    if path.is_dir():
        raise AttnbiasError(f"{path} is a folder; a file is written.")


def may_be_folder(path: Path) -> None:
    """AttnbiasError where a file stands in place of the folder that is asked for."""
    if path.exists() and not path.is_dir():
        raise AttnbiasError(f"out must be a folder, got the file {path}.")


def show_table(title: str, rows: Sequence[Sequence[str]], heads: Sequence[str] = ()) -> None:
    """Print a title and a table; without heads two columns, the second to the right."""
    from rich.console import Console
    from rich.table import Table

    print(title)
    shown = Table(*heads, show_header=bool(heads))
    if not heads:
        shown.add_column()
        shown.add_column(justify="right")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
