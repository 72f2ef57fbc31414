"""`attnbias list [--json]`: the works the library covers."""

from __future__ import annotations

import argparse
import json

from attnbias.catalogue import works


def add(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the parser."""
    parser = subparsers.add_parser("list", help="the works covered, their objects and marks")
    parser.add_argument("--json", action="store_true", help="everything known, as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the catalogue; returns 0."""
    if args.json:
        print(json.dumps([work.as_dict() for work in works()], indent=2, ensure_ascii=False))
        return 0
    rows = [("id", "year", "family", "marks", "objects")]
    for work in works():
        marks = ", ".join(work.marks) or "none yet"
        objects = ", ".join(path.removeprefix("attnbias.") for path in work.objects)
        rows.append((work.id, str(work.year), work.family, marks, objects))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[4]
        )
    return 0
