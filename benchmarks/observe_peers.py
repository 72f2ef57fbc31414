"""Seeing the attention of one model on one text: attnbias beside the tools people use for it.

    make bench-peers            (environments of their own: bertviz and TransformerLens, inseq)

A trained Llama-type decoder (stories260K: 5 layers of 8 heads, grouped keys) reads Tiny Shakespeare
at several lengths. Each line runs in a fresh process, forward included, and gives the same numbers
of every head (received attention, entropy, first token, distance, previous token, largest weight):
attnbias without a map, the others from theirs, computed with PyTorch. bertviz makes its page
instead. inseq reads attention step by step while it generates, here the last 8 tokens only. Ratios
are to the model's plain fused forward; memory is the peak resident size less that of the plain
forward's process. A line that does not end within the limit, or does not fit, says so.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

MODULE = "benchmarks.observe_peers"
LENGTHS = (512, 2048, 8192)
FLOOR, OWN = "forward", "attnbias"
LINES = (FLOOR, "eager forward", OWN, "eager maps", "bertviz", "transformer_lens", "inseq")
LIMIT_S = 60
MEMORY = 20 * 10**9
REPEATS = 3
ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
PEERS = ROOT / ".venv-peers"
WORKER = Path(__file__).with_name("observe_peer_worker.py")


def python_of(line: str, environments: Path) -> str:
    """The interpreter of the environment that holds a line's library."""
    name = "inseq" if line == "inseq" else "lenses"
    return str(environments.absolute() / name / "bin" / "python")


def run(line: str, tokens: int, python: str) -> dict[str, Any]:
    """One line in a fresh process: seconds, peak, its numbers; or why there are none."""
    given = [line, str(DATA / "stories260K-hf"), str(DATA / "tinyshakespeare.txt")]
    command = [python, str(WORKER), *given, str(tokens), str(REPEATS)]
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            cwd=ROOT,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"not done in {LIMIT_S} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
        return {"status": "failed", "reason": last[:160]}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return {"status": "ok", "took_s": round(time.perf_counter() - begin, 2), **found}


def group(tokens: int, environments: Path, tick: Any) -> dict[str, Any]:
    """Every line at one length; the numbers of attnbias against those from the eager maps."""
    cells = {}
    for line in LINES:
        tick(f"{tokens:,} tokens, {line}")
        cells[line] = run(line, tokens, python_of(line, environments))
    floor = cells[FLOOR]
    for cell in cells.values():
        if cell["status"] == "ok" and floor["status"] == "ok":
            median = statistics.median(cell["seconds"])
            cell["median_s"] = round(median, 4)
            cell["ratio"] = round(median / statistics.median(floor["seconds"]), 2)
            cell["extra_mb"] = round((cell["peak_bytes"] - floor["peak_bytes"]) / 1e6, 1)
    want = cells["eager maps"].get("found") or {}
    for line in (OWN, "transformer_lens"):
        got = cells[line].get("found") or {}
        if want and got:
            cells[line]["error"] = max(
                abs(a - b) / max(abs(b), 1)
                for name in want
                for one, two in zip(got[name], want[name], strict=True)
                for a, b in zip(one, two, strict=True)
            )
    for cell in cells.values():
        found = cell.pop("found", None) or {}
        cell |= {k: v for k, v in found.items() if isinstance(v, int)}
    return {"tokens": tokens, "lines": cells}


def markdown(payload: dict[str, Any]) -> str:
    """The report."""
    rows = []
    for one in payload["groups"]:
        for name, cell in one["lines"].items():
            if cell["status"] != "ok":
                rows.append([name, f"{one['tokens']:,}", cell["reason"], "", "", ""])
                continue
            more = f"page of {cell['page_bytes'] / 1e6:.0f} MB" if "page_bytes" in cell else ""
            if "steps" in cell:
                more = f"attention of {cell['steps']} tokens only"
            if "error" in cell:
                more = f"off the eager maps by {cell['error']:.0e}"
            seconds = f"{cell['median_s']:.3f}"
            ratio = f"{cell['ratio']:.2f}"
            rows.append(
                [name, f"{one['tokens']:,}", seconds, ratio, f"{cell['extra_mb']:,.0f}", more]
            )
    columns = ["line", "tokens", "s", "x forward", "MB over forward", ""]
    parts = [
        "# Seeing attention, beside other tools",
        common.header_markdown(payload),
        "Versions of the environments: " + json.dumps(payload["peers"]) + ".",
        (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        common.markdown_table(columns, rows),
    ]
    return "\n\n".join(parts) + "\n"


def peers(environments: Path) -> dict[str, str]:
    """The versions in the environments of the peers."""
    code = """
import importlib.metadata as m, json
names = ("torch", "transformers", "bertviz", "transformer-lens", "inseq", "numba")
there = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({n: there[n] for n in names if n in there}))
"""
    found: dict[str, str] = {}
    for line in (OWN, "inseq"):
        done = subprocess.run(
            [python_of(line, environments), "-c", code], capture_output=True, text=True, check=True
        )
        found |= json.loads(done.stdout)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    made = argparse.ArgumentParser(prog=f"python -m {MODULE}")
    made.add_argument("--environments", type=Path, default=PEERS, metavar="DIR")
    made.add_argument("--quick", action="store_true", help="512 tokens, written to out/ instead")
    made.add_argument("--only", type=int, nargs="+", metavar="N", help="only these lengths")
    args = made.parse_args(given)
    if not DATA.is_dir() or not Path(python_of(OWN, args.environments)).is_file():
        print(f"left out: needs ../shared/data and {args.environments} (make bench-peers makes it)")
        return 0
    lengths = args.only or (LENGTHS[:1] if args.quick else LENGTHS)
    started, begin = common.now(), time.perf_counter()
    total = len(lengths) * len(LINES)
    with common.progress("observe, beside peers", total) as advance:
        groups = [group(n, args.environments, lambda what: advance(1, what)) for n in lengths]
    head = common.header(
        MODULE, [], seeds={"torch": 0}, started=started, seconds=time.perf_counter() - begin
    )
    head["code"] = common.fingerprint(
        "attnbias", "benchmarks/observe_peers.py", "benchmarks/observe_peer_worker.py"
    )
    payload = {**head, "peers": peers(args.environments), "groups": groups}
    path = common.SCRATCH / "observe_peers.json"
    if set(lengths) == set(LENGTHS):
        path = common.recorded_or_scratch("observe_peers.json", common.machine())
    common.write_result(path, payload, markdown(payload))
    print(markdown(payload))
    return 0 if groups[0]["lines"][OWN]["status"] == "ok" else 1


if __name__ == "__main__":
    sys.exit(main())
