"""All GPU benchmarks: `python -m benchmarks.gpu [--rehearse] [--only NAME ...] [--minutes M]`.

Groups are measured in a process of their own, first what goals speak of, small sizes first, and
written as they finish; a group whose process dies or hangs is tried once more without the line that
did it. The run ends within `--minutes`; a rerun goes on with what is missing. Results are one JSON
file for each card, and its report, under benchmarks/results/gpu/. `--rehearse` runs every script to
its end on the CPU at tiny sizes, with interpreted kernels, and records nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

MODULE = "benchmarks.gpu"
FOLDER = common.RESULTS / "gpu"
PATIENCE = 180.0  # seconds without a word after which a process is taken to hang
SEEN = 0.05  # of the largest output: what a bias must move it by in a rehearsal
GRACE = 30.0  # seconds after the end of the time until a process is ended


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__.split("\n")[0])
    made.add_argument("--rehearse", action="store_true", help="tiny sizes, interpreted, on the CPU")
    made.add_argument("--only", nargs="+", metavar="NAME", help="only these scripts")
    made.add_argument("--match", metavar="WORDS", help="only groups with these words in their key")
    made.add_argument("--minutes", type=float, default=25.0, help="end within so many minutes")
    made.add_argument("--budget", type=float, default=1.5, help="seconds of timing of a group")
    made.add_argument("--fresh", action="store_true", help="measure again what is there already")
    made.add_argument("--again", action="store_true", help="measure again what failed")
    made.add_argument("--list", action="store_true", help="name the groups and run nothing")
    made.add_argument("--out", type=Path, help="the JSON file (benchmarks/results/gpu/...)")
    made.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    return made


def slug(name: str) -> str:
    """A file's name from a card's."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def load(path: Path) -> dict[str, Any]:
    return common.load_grid(path)


class Run:
    """One run: what is there, what comes in, and the file that both go to."""

    def __init__(self, given: Sequence[str], args: argparse.Namespace) -> None:
        self.given, self.args = list(given), args
        self.started, self.begin = common.now(), time.perf_counter()
        self.device: dict[str, Any] = {}
        self.ceilings: dict[str, float] | None = None
        self.path: Path | None = args.out
        self.found: dict[str, Any] = {"groups": {}, "runs": []}
        self.at: tuple[str, str] | None = None  # group and line of the last word

    def hear(self, said: Mapping[str, Any]) -> str | None:
        """Take in a word of the process; the key of a group that is done."""
        if "device" in said:
            self.device = dict(said["device"])
            if self.path is None:
                self.path = FOLDER / f"{slug(self.device['name'])}.json"
            if not self.found["groups"] and not self.args.rehearse:
                self.found = load(self.path)
        elif "ceilings" in said:
            self.ceilings = dict(said["ceilings"])
        elif "at" in said:
            self.at = said["of"], said["at"]
        elif "lost" in said:
            print(f"lost: {said['of']}: {said['lost']}", file=sys.stderr, flush=True)
        elif "key" in said:
            self.found["groups"][said["key"]] = {"run": self.started, **said["group"]}
            self.at = None
            self.store()
            return str(said["key"])
        return None

    def payload(self) -> dict[str, Any]:
        from benchmarks.gpu.group import verdicts
        from benchmarks.gpu.work import SCRIPTS, all_groups, fingerprint, script

        head = common.header(
            MODULE, self.given, seeds={"tensors": 70}, started=self.started,
            seconds=time.perf_counter() - self.begin,
        )  # fmt: skip
        whole = list(all_groups(self.args.rehearse))
        made = common.grid(head, self.found["runs"], self.found["groups"], whole)
        made |= {"device": self.device, "ceilings": self.ceilings or {}}
        made["fingerprint"] = fingerprint()
        made["goals"] = [v for name in SCRIPTS for v in verdicts(name, script(name).GOALS, made)]
        return made

    def store(self) -> None:
        from benchmarks.gpu.report import markdown

        payload = self.payload()
        if self.args.rehearse and self.args.out is None:
            markdown(payload)  # written nowhere, but written
            return
        assert self.path is not None
        common.write_result(self.path, payload, markdown(payload))


def words(asked: Mapping[str, Any], patience: float, grace: float) -> Iterator[dict[str, Any]]:
    """What a working process says; it is ended when it is silent for too long, or too late."""
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE, "--work"],
        cwd=common.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=dict(os.environ, PYTHONUNBUFFERED="1"),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    last = time.monotonic()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1.0):
            if time.monotonic() - last > patience or time.time() > asked["until"] + grace:
                process.kill()
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        process.stdin.write(json.dumps(asked))
        process.stdin.close()
        for line in process.stdout:
            last = time.monotonic()
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)
        yield {"code": process.wait()}
    finally:
        over.set()
        process.kill()
        process.stdout.close()
        process.wait()


def measure(run: Run, keys: Sequence[str], until: float, advance: Callable[[str], None]) -> None:
    """Processes one after another until all groups are done, or the time is over."""
    todo, skips = list(keys), dict[str, list[str]]()
    while todo and time.time() < until:
        asked = {
            "keys": list(todo), "rehearse": run.args.rehearse, "budget": run.args.budget,
            "until": until, "ceilings": run.ceilings, "skips": skips,
        }  # fmt: skip
        code, before = 1, len(todo)
        run.at = None
        for said in words(asked, PATIENCE, GRACE):
            code = said.get("code", code)
            done = run.hear(said)
            if done is not None:
                todo.remove(done)
                advance(done)
        if code == 0 or time.time() >= until:
            return
        if run.at is None:
            if len(todo) == before:
                print(f"the process ended with code {code} before any group", file=sys.stderr)
                return
            continue
        # It died, or hung, in a line of a group: once more without that line, behind the others.
        key, line = run.at
        print(f"{key}: the process ended with code {code} in {line}", file=sys.stderr, flush=True)
        skips.setdefault(key, []).append(line)
        todo.remove(key)
        if len(skips[key]) <= 2:
            todo.append(key)
        else:
            reason = f"the process died in {', '.join(skips[key])}"
            failed = {"status": "failed", "reason": reason, "script": key.split("/")[0]}
            run.hear({"key": key, "group": failed})
            advance(key)


def rehearse(run: Run, keys: Sequence[str], until: float, advance: Callable[[str], None]) -> None:
    """All groups in this process, on the CPU."""
    from benchmarks.gpu.device import open_device
    from benchmarks.gpu.work import all_groups, measure_all

    device, groups = open_device(True), all_groups(True)
    run.hear({"device": device.describe()})

    def tell(said: Mapping[str, Any]) -> None:
        done = run.hear(said)
        if done is not None:
            advance(done)

    todo = [groups[key] for key in keys]
    measure_all(todo, device, tell, budget=run.args.budget, until=until)


def stale(group: Mapping[str, Any] | None, args: argparse.Namespace) -> bool:
    """Whether a group is to be measured."""
    if group is None or args.fresh:
        return True
    lines = group.get("lines", {})
    failed = group["status"] != "ok" or any(c["status"] == "failed" for c in lines.values())
    return bool(args.again and failed)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    if args.work:
        from benchmarks.gpu.work import worker

        return worker()
    if args.rehearse:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports the kernels
    from benchmarks.gpu.device import open_device
    from benchmarks.gpu.work import SCRIPTS, all_groups

    if unknown := [name for name in args.only or () if name not in SCRIPTS]:
        print(f"--only takes {', '.join(SCRIPTS)}, got {', '.join(unknown)}", file=sys.stderr)
        return 2
    keys = [
        key for key in all_groups(args.rehearse, args.only or SCRIPTS) if (args.match or "") in key
    ]
    if args.list:
        print("\n".join(keys))
        return 0
    device = open_device(args.rehearse)
    run = Run(given, args)
    run.hear({"device": device.describe()})
    groups = run.found["groups"]
    todo = [key for key in keys if stale(groups.get(key), args)]
    until = time.time() + 60 * args.minutes
    print(
        f"{len(todo)} groups, within {args.minutes:g} minutes, on {run.device['name']}", flush=True
    )
    with common.progress("gpu", max(len(todo), 1)) as advance:
        (rehearse if args.rehearse else measure)(run, todo, until, lambda key: advance(1, key))
    left = [key for key in todo if groups.get(key, {}).get("run") != run.started]
    bad = [key for key in todo if key not in left and groups[key]["status"] != "ok"]
    if args.rehearse:
        bad += broken(groups)
    elif todo:
        run.store()
        assert run.path is not None
        print(f"written: {run.path} and {run.path.with_suffix('.md').name}")
    if left:
        print(f"no time for {len(left)} groups: call it again, it goes on there", file=sys.stderr)
    if bad:
        print(f"failed: {', '.join(bad)}", file=sys.stderr)
    return 1 if bad or left else 0


def broken(groups: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of a rehearsal, lines that failed, and our lines that are wrong or do not repeat."""
    from benchmarks.gpu.group import reason

    found = []
    for key, group in groups.items():
        for name, cell in group.get("lines", {}).items():
            if cell["status"] == "failed":
                found.append(f"{key}, {name}: {cell['reason']}")
        if "case" in group and (why := reason(group)):
            found.append(f"{key}, ours: {why}")
        if group.get("bias_left_out", 1.0) < SEEN:
            found.append(f"{key}: leaving the bias out would not show")
        if "model" in group:
            errors = {n: c["error"]["output"] for n, c in group["lines"].items() if "error" in c}
            fused = errors.pop("fused", None)
            if fused is None or fused > 2 * max(errors.values()):
                found.append(f"{key}: fused is off by {fused}, stock by {max(errors.values())}")
    return found


if __name__ == "__main__":
    sys.exit(main())
