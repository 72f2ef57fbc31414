"""What every benchmark shares: the header of a result, files, tables, progress.

A result file says how it was made: command, commit, seeds, machine, versions, start and duration.
Timing lives in `benchmarks.timing` and peak memory in `benchmarks.memory`; both are named here too.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory import ChildFailed, fresh, peak_bytes
from benchmarks.timing import Timing, interleave, rounds_for

__all__ = [
    "IMAGES",
    "RESULTS",
    "ROOT",
    "SCRATCH",
    "ChildFailed",
    "Timing",
    "commit",
    "cpu_model",
    "duration",
    "earlier_runs",
    "fingerprint",
    "fresh",
    "header",
    "header_markdown",
    "interleave",
    "machine",
    "markdown_table",
    "memory_bytes",
    "now",
    "peak_bytes",
    "progress",
    "recorded_or_scratch",
    "rounds_for",
    "same_box",
    "save_figure",
    "versions",
    "write_json",
    "write_text",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
SCRATCH = ROOT / "out" / "benchmarks"  # quick runs: never among the recorded results
# What the benchmarks write themselves does not make a tree dirty.
_OWN_OUTPUT = (":!benchmarks/results", ":!experiments/results", ":!docs/images", ":!out")


def _git(*arguments: str) -> str | None:
    """The output of a git command in the repository; None where there is no git or repository."""
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit measured and whether files other than results differ from it."""
    head = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--", ".", *_OWN_OUTPUT)
    return {"commit": head or "unknown", "dirty": None if changes is None else bool(changes)}


def fingerprint(*parts: str) -> str:
    """SHA-256 (16 digits) over the Python sources below the given paths of the repository.

    Two measurements with one fingerprint measured the same code, whatever else was committed.
    """
    digest = hashlib.sha256()
    for part in parts:
        path = ROOT / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def memory_bytes() -> tuple[int, int]:
    """(total, available) memory in bytes; a limit on this control group counts as the total."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = total
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    with contextlib.suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        total, available = min(total, limit), min(available, limit - used)
    return total, available


def machine(threads: int | None = None) -> dict[str, Any]:
    """Processor, cores, memory in GB (10^9 bytes), system; threads used by torch when given."""
    found = {
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory_bytes()[0] / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    return found if threads is None else found | {"threads": threads}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can move a number; read without importing."""
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "attnbias"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # Run from a source tree that was not installed, the module itself knows.
            version = getattr(sys.modules.get(package), "__version__", None)
            found[package] = version or "not installed"
    return found


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def header(
    module: str,
    arguments: Sequence[str],
    *,
    seeds: Mapping[str, int],
    started: str,
    seconds: float,
    threads: int | None = None,
) -> dict[str, Any]:
    """The head of a result file.

    `module` and `arguments` give the command (`python -m module arguments`); `started` is what
    `now()` said at the start and `seconds` the duration measured by the caller.
    """
    return {
        "command": " ".join(["python -m", module, *arguments]),
        **commit(),
        "seeds": dict(seeds),
        "machine": machine(threads),
        "versions": versions(),
        "started": started,
        "seconds": round(seconds, 1),
    }


def same_box(head: Mapping[str, Any], box: Mapping[str, Any], made: Mapping[str, str]) -> bool:
    """Whether results with this header can stand beside new ones: one machine and one torch.

    Threads count where `box` names them.
    """
    parts = [part for part in ("cpu", "cores", "threads") if part in box]
    return all(head["machine"].get(part) == box[part] for part in parts) and (
        head["versions"].get("torch") == made["torch"]
    )


def recorded_or_scratch(name: str, box: Mapping[str, Any]) -> Path:
    """The recorded result file of that name, or, where it is of another machine, one in out/."""
    path = RESULTS / name
    if path.exists():
        head = json.loads(path.read_text(encoding="utf-8"))
        if not same_box(head, box, versions()):
            print(f"the recorded {name} is of another machine or torch: writing to {SCRATCH}")
            return SCRATCH / name
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all: a new file beside it, then one rename."""
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, payload: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all; a NaN or infinity is an error, not a silent `NaN`."""
    write_text(path, json.dumps(payload, indent=1, allow_nan=False) + "\n")


def write_result(path: Path, payload: Mapping[str, Any], text: str) -> None:
    """Write a result's JSON, and its Markdown beside it."""
    write_json(path, payload)
    write_text(path.with_suffix(".md"), text)


def load_grid(path: Path | None = None) -> dict[str, Any]:
    """A result file of a grid measured group by group, or an empty one."""
    if path is None or not path.exists():
        return {"groups": {}, "runs": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def grid(
    head: Mapping[str, Any],
    runs: Sequence[Mapping[str, Any]],
    groups: Mapping[str, Mapping[str, Any]],
    whole: Sequence[str],
) -> dict[str, Any]:
    """What the file of such a grid says of its groups, in the order of `whole`, the whole grid.

    `runs` are the headers of earlier runs; those whose groups are still in the file are kept.
    """
    order = {name: place for place, name in enumerate(whole)}
    ordered = dict(sorted(groups.items(), key=lambda item: order.get(item[0], len(order))))
    used = {group["run"] for group in ordered.values()}
    before = [run for run in runs if run["started"] in used and run["started"] != head["started"]]
    return {
        **head,
        "runs": [*before, dict(head)],
        "complete": all(name in groups for name in whole),
        "missing": [name for name in whole if name not in groups],
        "groups": ordered,
    }


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_figure(figure: Any, path: Path) -> None:
    """Save a matplotlib figure whole or not at all, without the date and version it would embed."""
    left_out = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    _replace(path, lambda temporary: figure.savefig(temporary, dpi=110, metadata=left_out))


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, the others to the right; `|` is escaped."""

    def line(cells: Iterable[object]) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    rule = "|---" + "|---:" * (len(columns) - 1) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def earlier_runs(payload: Mapping[str, Any]) -> list[str]:
    """Paragraphs that name the runs before the last, whose groups are in the tables, too."""
    runs = "\n".join(
        f"- run of {run['started']}: `{run['command']}`, commit {run['commit']}"
        f"{' (with uncommitted changes)' if run['dirty'] else ''}, {run['seconds']} s"
        for run in payload["runs"][:-1]
    )
    return ["Groups of earlier runs are in the tables:", runs] if runs else []


def header_markdown(head: Mapping[str, Any]) -> str:
    """The header as a few lines of text for the top of a Markdown report."""
    box, made = head["machine"], head["versions"]
    tree = " (with uncommitted changes)" if head["dirty"] else ""
    return "\n".join(
        [
            f"- command: `{head['command']}`",
            f"- commit: {head['commit']}{tree}",
            f"- machine: {box['cpu']}, {box['cores']} cores, {box['memory_gb']} GB, "
            f"{box.get('threads', '?')} threads, {box['system']}",
            "- versions: " + ", ".join(f"{name} {value}" for name, value in made.items()),
            f"- seeds: {head['seeds']}; started {head['started']}, took {head['seconds']} s",
        ]
    )


def duration(seconds: float) -> str:
    """Seconds in words that are short: `45 s`, `3.2 min`."""
    return f"{math.ceil(seconds)} s" if seconds < 90 else f"{seconds / 60:.1f} min"


@contextlib.contextmanager
def progress(title: str, total: float) -> Iterator[Callable[[float, str], None]]:
    """A progress bar on standard error; gives `advance(amount, text)`.

    Uses rich where it is installed (extra `report`), otherwise prints one line for each step.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:

        def tell(amount: float, text: str) -> None:
            print(f"{title}: {text}", file=sys.stderr, flush=True)

        yield tell
        return
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[text]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(title, total=total, text="")

        def advance(amount: float, text: str) -> None:
            bar.update(task, advance=amount, text=text)

        yield advance
