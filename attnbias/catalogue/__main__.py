"""`python -m attnbias.catalogue [--check]`, in a checkout: write what the catalogue makes."""

from __future__ import annotations

import sys
from pathlib import Path

from attnbias.catalogue import works
from attnbias.catalogue.marks import outputs


def main(argv: list[str]) -> int:
    """Write marks.json, the README's table and the docs page; with --check only compare."""
    root = Path(__file__).resolve().parents[2]
    made = outputs(works(), root)
    stale = [path for path, text in made.items() if not _holds(path, text)]
    for path in stale:
        print(("stale: " if "--check" in argv else "written: ") + str(path.relative_to(root)))
        if "--check" not in argv:
            path.write_text(made[path], encoding="utf-8")
    return 1 if stale and "--check" in argv else 0


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
