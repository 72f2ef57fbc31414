"""What the house tests look at: the files that belong to the project."""

from __future__ import annotations

import subprocess
from functools import lru_cache
from pathlib import Path

from tests.conftest import ROOT

NOT_OURS = {".venv", ".git", "__pycache__", "out", "site", "dist", "build"}


@lru_cache(maxsize=1)
def ours() -> tuple[Path, ...]:
    """Every file of the project: git's list where there is git, else what lies in the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout.strip():
        found = [ROOT / line for line in listed.stdout.splitlines()]
    else:
        found = [
            path
            for path in ROOT.rglob("*")
            if not any(
                part in NOT_OURS or part.endswith("_cache") or part == ".hypothesis"
                for part in path.relative_to(ROOT).parts
            )
        ]
    return tuple(sorted(path for path in found if path.is_file()))


def python_files(folder: str) -> list[Path]:
    """The project's Python files under a folder."""
    return [p for p in ours() if p.suffix == ".py" and (ROOT / folder) in p.parents]
