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
    for work in works():
        print(
            f"{work.id}  ({work.year}, {work.family})  marks: {', '.join(work.marks) or 'none yet'}"
        )
        print(f"    {work.title}")
        print(f"    objects:  {', '.join(work.objects)}")
        print(f"    evidence: {', '.join(work.evidence)}")
    return 0
