"""`python -m tests.mutants [--only NAME ...] [--jobs N] [--list]`: plant every kept defect."""

from __future__ import annotations

import argparse
import sys

from tests.conftest import ROOT
from tests.mutants import defects, models
from tests.mutants.runner import check, table

DEFECTS = (*defects.DEFECTS, *models.DEFECTS)


def main(argv: list[str] | None = None) -> int:
    """Run the list; 0 when the original passes and every defect is caught, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these defects alone")
    parser.add_argument("--jobs", type=int, default=2, help="copies of the tree at work at once")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    args = parser.parse_args(argv)
    names = {defect.name for defect in DEFECTS}
    if unknown := sorted(set(args.only or ()) - names):
        parser.error(f"no defect named {', '.join(unknown)}")
    chosen = [d for d in DEFECTS if not args.only or d.name in args.only]
    if args.list:
        print("\n".join(defect.name for defect in chosen))
        return 0
    verdicts = check(
        chosen, ROOT, jobs=args.jobs, say=lambda line: print(line, file=sys.stderr, flush=True)
    )
    print(table(verdicts))
    return 0 if all(verdict.good for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
