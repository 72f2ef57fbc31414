"""With torch alone: what needs no extra works, what needs one says which, in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from attnbias.cli import EXTRAS
from tests.conftest import ROOT

# A process in which the optional libraries are not installed, as far as it can see.
BARE = f"""
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(EXTRAS)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from attnbias.cli import main
sys.exit(main(sys.argv[1:]))
"""


def bare(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run the command line without the optional libraries."""
    command = [sys.executable, "-c", BARE, *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    "argv", [("list",), ("explain", "--bias", "alibi", "--queries", "64"), ("--help",)]
)
def test_works_with_torch_alone(argv: tuple[str, ...]) -> None:
    done = bare(*argv)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_says_which_extra_is_missing(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A short text.")
    report = tmp_path / "out.html"
    done = bare("observe", str(tmp_path), "--text", str(text), "--report", str(report))
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("attnbias: ")
    assert done.stderr.count("\n") == 1
    assert "pip install 'attnbias[" in done.stderr
    assert not report.exists()
