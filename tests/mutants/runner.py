"""Plants defects, one at a time, in a copy of the tree, and sees whether the tests notice."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

# What a copy of the tree does not need; the last three are large or private to the original.
LEFT_OUT = (
    "__pycache__",
    ".*_cache",
    ".hypothesis",
    "site",
    "out",
    "dist",
    "build",
    ".venv*",
    ".git",
)

ORIGINAL = "(the original)"


@dataclass(frozen=True)
class Defect:
    """One planted defect.

    name: what is wrong, in a few words joined by hyphens. file: path in the repository.
    old: text that stands exactly once in the file. new: what replaces it. tests: pytest node ids
    that pass on the original and of which at least one must fail on the defect.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What became of one defect; `good` when the tests did their duty."""

    name: str
    good: bool
    words: str
    seconds: float


def check(
    defects: Sequence[Defect],
    root: Path,
    *,
    jobs: int = 2,
    timeout: float = 600,
    say: Callable[[str], None] = lambda line: None,
) -> list[Verdict]:
    """Run the named tests on the original, then on each defect; a verdict for each, original first.

    The defects are not tried when the original fails: nothing could be read from it.
    """
    with tempfile.TemporaryDirectory(prefix="attnbias-mutants-") as folder:
        copies: queue.Queue[Path] = queue.Queue()
        for number in range(max(1, jobs)):
            copies.put(_copy(root, Path(folder) / str(number)))
        every = tuple(dict.fromkeys(test for defect in defects for test in defect.tests))
        first = _judge_original(copies.queue[0], every, timeout)
        say(_line(first))
        if not first.good:
            return [first]

        def one(defect: Defect) -> Verdict:
            copy = copies.get()
            try:
                verdict = _judge(defect, copy, timeout)
            finally:
                copies.put(copy)
            say(_line(verdict))
            return verdict

        with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
            return [first, *pool.map(one, defects)]


def plant(defect: Defect, text: str) -> str:
    """The file's text with the defect in it; ValueError when its old text is not there once."""
    found = text.count(defect.old)
    if found != 1:
        raise ValueError(f"the old text stands {found} times in {defect.file}, not once")
    if defect.new == defect.old:
        raise ValueError("the new text is the old text")
    return text.replace(defect.old, defect.new)


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts as lines of text, and one line that counts them."""
    caught = sum(verdict.good for verdict in verdicts if verdict.name != ORIGINAL)
    planted = sum(verdict.name != ORIGINAL for verdict in verdicts)
    return "\n".join([*map(_line, verdicts), f"{caught} of {planted} defects caught"])


def _line(verdict: Verdict) -> str:
    mark = "ok " if verdict.good else "BAD"
    return f"{mark}  {verdict.name:<40} {verdict.words:<40} {verdict.seconds:6.1f} s"


def _copy(root: Path, folder: Path) -> Path:
    """A copy of the tree, with the shared data (if any) beside it as it is beside the original."""
    copy = folder / "tree"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    shared = root.parent / "shared"
    if shared.is_dir():
        (folder / "shared").symlink_to(shared, target_is_directory=True)
    return copy


def _judge_original(copy: Path, tests: tuple[str, ...], timeout: float) -> Verdict:
    code, seconds, tail = _pytest(copy, tests, timeout)
    return Verdict(ORIGINAL, code == 0, "passes" if code == 0 else f"code {code}: {tail}", seconds)


def _judge(defect: Defect, copy: Path, timeout: float) -> Verdict:
    path = copy / defect.file
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(plant(defect, before), encoding="utf-8")
        code, seconds, tail = _pytest(copy, defect.tests, timeout)
    except ValueError as error:
        return Verdict(defect.name, False, str(error), 0.0)
    finally:
        path.write_text(before, encoding="utf-8")
    # 1: tests failed. A negative code: the process died, which nobody overlooks either.
    if code == 1 or (code is not None and code < 0):
        return Verdict(defect.name, True, "caught" if code == 1 else "caught (crash)", seconds)
    words = {0: "SURVIVED", None: "no end within the time limit"}.get(code, f"code {code}: {tail}")
    return Verdict(defect.name, False, words, seconds)


def _pytest(copy: Path, tests: tuple[str, ...], timeout: float) -> tuple[int | None, float, str]:
    """Exit code (None: ran out of time), seconds, and the line of output that tells most."""
    # No bytecode: two versions of a file with one size and one second would share it.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    paths = os.pathsep.join((str(copy), str(copy / "models")))
    environment = outer | {"PYTHONPATH": paths, "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["-q", "-x", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return None, time.perf_counter() - start, ""
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, time.perf_counter() - start, (failed or lines)[-1]
