"""Which versions of Triton each kernel was run on: the tests of the kernels under each.

python -m tests.kernels.versions [FILE ...] [--version V ...] [--minutes M]

Each version of Triton is installed alone into a folder of its own and stands before the
environment's on the path; the tests are those of this folder, interpreted where there is no GPU.
What was run is kept and not run again while the kernels and the test are the same (--fresh runs
anew), so that a stopped run goes on. The result is benchmarks/results/kernel_versions.json and .md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, header, header_markdown, markdown_table, now, write_json

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".venv-versions"
# The last release of every minor version that pyproject.toml admits.
VERSIONS = ("3.7.1", "3.8.0", "3.9.0")
TITLE = "Kernels and versions of Triton"

# file -> version -> {"state", "seconds", "failures", "kernels": name -> [passed, failed]}
Runs = dict[str, dict[str, dict[str, Any]]]


def folder(version: str) -> Path | None:
    """Where a version lies, installed if it does not lie there yet; None for the environment's."""
    if version == installed("triton"):
        return None
    where = FOLDER / f"triton-{version}"
    if not (where / ".done").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(where), f"triton=={version}"], check=True)
        (where / ".done").touch()
    return where


def environment(version: str) -> dict[str, str]:
    """The variables under which a process finds that version."""
    where = folder(version)
    path = [] if where is None else [str(where)]
    path += [str(ROOT), os.environ.get("PYTHONPATH", "")]
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    one = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, path))}
    return {**os.environ, **interpreted, **one}


def state(name: str) -> str:
    """Changes when a kernel or the test file does."""
    files = [*sorted((ROOT / "attnbias" / "kernels").glob("*.py")), ROOT / "tests/kernels" / name]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def run(name: str, version: str) -> dict[str, Any]:
    """The tests of one file under one version."""
    before, begun = state(name), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch, "ran.json")
        done = subprocess.run(
            [sys.executable, "-m", "pytest", f"tests/kernels/{name}", "-q", "-p",
             "no:cacheprovider", "-p", "tests.kernels.ran", "--kernels-ran", str(found),
             "--timeout", "1800", "-m", "not slow"],
            cwd=ROOT, env=environment(version), capture_output=True, text=True,
        )  # fmt: skip
        kernels = json.loads(found.read_text("utf-8")) if found.is_file() else {}
    lines = done.stdout.splitlines()
    failures = [line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))]
    if not kernels and done.returncode not in (0, 5):
        failures = failures or [(done.stderr or done.stdout).strip()[-200:]]
    seconds = round(time.perf_counter() - begun, 1)
    return {"state": before, "seconds": seconds, "failures": failures, "kernels": kernels}


def table(runs: Runs) -> dict[str, dict[str, list[int]]]:
    """kernel -> version -> [tests passed, tests failed]."""
    found: dict[str, dict[str, list[int]]] = {}
    for tried in runs.values():
        for version, one in tried.items():
            for kernel, counts in one["kernels"].items():
                if kernel != "no kernel":
                    row = found.setdefault(kernel, {}).setdefault(version, [0, 0])
                    row[0] += counts[0]
                    row[1] += counts[1]
    return dict(sorted(found.items()))


def _cell(counts: list[int] | None) -> str:
    if counts is None:
        return "not run"
    return f"{counts[0]} passed" + (f", {counts[1]} failed" if counts[1] else "")


def write(runs: Runs, started: str, seconds: float) -> None:
    found = table(runs)
    how = header("tests.kernels.versions", [], seeds={}, started=started, seconds=seconds)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "interpreted, no GPU"
    write_json(RESULTS / "kernel_versions.json", {**how, "where": where, "runs": runs})
    rows = [[f"`{k}`", *(_cell(row.get(v)) for v in VERSIONS)] for k, row in found.items()]
    failures = [
        f"- {version}: {line}"
        for tried in runs.values()
        for version, one in tried.items()
        for line in one["failures"]
    ]
    text = [
        f"# {TITLE}",
        header_markdown(how),
        f"Tests that launched each kernel, {where}, with PyTorch {torch.__version__}.",
        markdown_table(["kernel", *(f"Triton {v}" for v in VERSIONS)], rows),
        *(["Failures:\n\n" + "\n".join(failures)] if failures else []),
    ]
    (RESULTS / "kernel_versions.md").write_text("\n\n".join(text) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for and not yet known, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="*", help="names such as test_forward.py; default: all")
    parser.add_argument("--version", action="append", default=[], help="only these")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin nothing after that")
    parser.add_argument("--jobs", type=int, default=2, help="files of tests at a time")
    parser.add_argument("--fresh", action="store_true", help="run again what was run")
    args = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    kept = FOLDER / "kernels.json"
    runs: Runs = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    names = args.files or sorted(p.name for p in Path(__file__).parent.glob("test_*.py"))
    started, begun = now(), time.monotonic()
    end = begun + 60 * args.minutes
    versions = args.version or VERSIONS
    for version in versions:
        folder(version)
    todo = [
        (name, version)
        for version in versions
        for name in names
        if args.fresh or runs.get(name, {}).get(version, {}).get("state") != state(name)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        running = {pool.submit(run, *one): one for one in todo}
        for done in as_completed(running):
            if done.cancelled():
                continue
            name, version = running[done]
            found = runs.setdefault(name, {})[version] = done.result()
            print(f"{name}, Triton {version}: {found['failures'] or 'passed'}", flush=True)
            kept.write_text(json.dumps(runs, indent=1), "utf-8")
            if time.monotonic() > end:
                for left in running:
                    left.cancel()
    write(runs, started, time.monotonic() - begun)
    return 0


if __name__ == "__main__":
    sys.exit(main())
